"""Form -> the authors' directory: one copy of the shared tensors under every module, as their `save_pretrained` writes it."""

import json
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from bslora_convert.bslora.form import LEVELS, PARTS, BsloraForm, Module
from bslora_convert.bslora.official.config import official_config
from bslora_convert.bslora.official.plan import MODULE, SCALING, OfficialPlan, fits, group_of, key_of, target_modules
from bslora_convert.bslora.storage import CONFIG_NAME, WEIGHTS_NAME
from bslora_convert.bslora.transforms import Slice
from bslora_convert.errors import Refused
from bslora_convert.files.tensorfile import write_tensors
from bslora_convert.modules.factors import Factors
from bslora_convert.modules.names import layer_of, natural_order

INSTEAD = "expand it to a LoRA instead"


def save_official(form: BsloraForm, directory: FilePath, config: Mapping[str, Any]) -> None:
    """Writes the two files into an existing directory.

    The authors' code multiplies by 2, so every B is stored halved: exact, but for numbers so small that the dtype has no
    finer ones (below 1.2e-4 in float16, 2.4e-38 in bfloat16 and float32).

    config: PEFT fields to take over, those that are set.

    :raises Refused: when their layout can't hold the form; the message says what is in the way.
    """
    plan = plan_of(form)
    names = sorted(form.modules, key=natural_order)
    groups = {
        level: {group: _stored(pair, plan.ranks[level]) for group, pair in of.items()}
        for level, of in form.shared.items()
    }
    tensors: dict[str, Tensor] = {}
    for name in names:
        for theirs, tensor in _tensors(plan, form.modules[name], groups).items():
            tensors[key_of(name, theirs)] = tensor
    write_tensors(directory / WEIGHTS_NAME, tensors)
    text = json.dumps(official_config(plan, config, target_modules(names)), indent=2)
    (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def plan_of(form: BsloraForm) -> OfficialPlan:
    """Transform and ranks under which the authors' code holds a form; each path takes the largest rank of its pairs.

    :raises Refused: when it can't.
    """
    if form.transform is None:
        raise Refused(f"transform none: the authors' layout always shares; {INSTEAD}")
    if isinstance(form.transform, Slice) and form.transform.window != "center":
        raise Refused(f"slice {form.transform.window}: the authors' code cuts from the centre only; {INSTEAD}")
    for name, module in form.modules.items():
        if module.kind != "linear" or not MODULE.match(name):
            raise Refused(
                f"module {name}: the authors' code knows a layer by names of the form model.layers.N.block.module; {INSTEAD}"
            )
        if reason := fits(form.transform, module.shape):
            raise Refused(f"module {name}: {reason}, and the authors' code cuts no edges; {INSTEAD}")
        for level, path in module.paths.items():
            if "A" in path.own and path.own["A"].shape[0] != 1:
                raise Refused(
                    f"module {name}: {level} kernels of rank {path.own['A'].shape[0]}; the authors released kernels of "
                    f"rank 1; {INSTEAD}"
                )
    _check_groups(form)
    ranks = {"local": max(module.local.rank for module in form.modules.values())}
    return OfficialPlan(form.transform, ranks | {level: form.shared_rank(level) for level in LEVELS})


def _check_groups(form: BsloraForm) -> None:
    """Refuses modules that do not share as the authors' do: one pair a layer, and one for everyone.

    :raises Refused: naming a module.
    """
    for level in form.shared:
        owners: dict[str, tuple[str, str]] = {}
        for name, module in form.modules.items():
            path = module.paths.get(level)
            if path is None:
                raise Refused(
                    f"module {name} has no {level} part; in the authors' layout every module has one; {INSTEAD}"
                )
            group, owner = owners.setdefault(group_of(level, name), (path.group, name))
            if path.group != group:
                scope = f"layer {layer_of(name)}" if level == "intra" else "the model"
                raise Refused(
                    f"modules {owner} and {name}: two {level} pairs in {scope}, one can be written; {INSTEAD}"
                )


def _tensors(plan: OfficialPlan, module: Module, groups: Mapping[str, Mapping[str, Factors]]) -> dict[str, Tensor]:
    """Everything that stands under a module, by the authors' names; what only a path of rank 0 would use is zero.

    groups: the shared pairs as they are stored.
    """
    dtype = module.local.b.dtype
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, shape in plan.shapes(module.shape).items()}
    pairs = {"local": _stored(module.local, plan.ranks["local"])}
    pairs |= {level: groups[level][path.group] for level, path in module.paths.items()}
    for part in PARTS:
        if part in pairs:
            tensors |= {f"lora_A.{part}": pairs[part].a, f"lora_B.{part}": pairs[part].b}
    for level, path in module.paths.items():
        tensors |= {theirs: path.own[ours] for ours, theirs in plan.own(level).items()}
    return tensors


def _stored(pair: Factors, rank: int) -> Factors:
    """A pair with B over the authors' scaling, filled up with zeros to `rank`."""
    missing = rank - pair.rank
    return Factors(pad(pair.b / SCALING, (0, missing)), pad(pair.a, (0, 0, 0, missing)))
