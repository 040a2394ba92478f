"""Factors by module name -> a standard PEFT LoRA directory that servers scale right.

All scaling is in B and `lora_alpha == r`, the largest rank; where ranks vary, `rank_pattern == alpha_pattern`, so that a reader
which ignores both patterns and divides by `r` still multiplies by one. One that divides by a tensor's own rank needs equal ranks.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.files.tensorfile import write_tensors
from bslora_convert.lora.experts import ROUTER, stacked
from bslora_convert.lora.fields import inherited
from bslora_convert.lora.fused import ends_of, fused, in_fused
from bslora_convert.lora.keys import PREFIX
from bslora_convert.lora.names import key_for
from bslora_convert.lora.place import CONFIG_NAME
from bslora_convert.lora.targets import selects, target_fields
from bslora_convert.lora.tying import head_copy, head_of
from bslora_convert.modules.factors import Factors

WEIGHTS_NAME = "adapter_model.safetensors"
NOTHING: dict[str, Any] = {"target_modules": []}
SIDES = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "tied_embedding": ("lora_embedding_A", "lora_embedding_B"),
}


def save_lora(
    directory: Path,
    modules: Mapping[str, Factors],
    kinds: Mapping[str, str],
    carried: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into an existing directory.

    config: the source's own fields, of which those are taken over that mean the same. PEFT loads no rank 0: such a module gets a
    rank of zeros; experts get as many as the largest rank asks for. A tied embedding's factors stand there for the head as well,
    as PEFT saves them.
    """
    whole = fused(modules)
    experts = in_fused(modules)
    apart = {name: factors for name, factors in modules.items() if name not in experts}
    largest = max(1, *(factors.rank for factors in modules.values()))
    stack = stacked(apart)
    modules = {name: factors.padded(largest if name in stack else 1) for name, factors in apart.items()}
    copies = {
        head: head_copy(factors)
        for name, factors in modules.items()
        if kinds[name] == "tied_embedding" and (head := head_of(name)) not in modules
    }
    tensors = {PREFIX + name: tensor for name, tensor in carried.items()}
    tensors |= factor_tensors({**modules, **copies, **{one.name: one.factors for one in whole.values()}}, kinds, dtype)
    write_tensors(directory / WEIGHTS_NAME, tensors)
    ranks = {name: factors.rank for name, factors in modules.items()}
    tied = {name: factors.rank for name, factors in copies.items()}
    parameters = {name: one.rank for name, one in whole.items()}
    text = json.dumps(peft_config(ranks, config, tied, parameters), indent=2)
    (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def factor_tensors(modules: Mapping[str, Factors], kinds: Mapping[str, str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Each factor by its key in a PEFT LoRA's file: A (r, in), B (out, r)."""
    tensors = {}
    for name, factors in modules.items():
        side_a, side_b = SIDES[kinds.get(name, "linear")]
        tensors[f"{PREFIX}{name}.{side_a}"] = factors.a.to(dtype)
        tensors[f"{PREFIX}{name}.{side_b}"] = factors.b.to(dtype)
    return tensors


def peft_config(
    ranks: Mapping[str, int],
    config: Mapping[str, Any],
    tied: Mapping[str, int] | None = None,
    parameters: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """A PEFT LoRA configuration for modules of these ranks: `r` is the largest, and each other rank has one pattern.

    tied: ranks of heads that PEFT adapts by itself because they are tied, so that no target names them. parameters: ranks of
    parameters that hold experts; a router beside them is adapted by its weight.
    """
    parameters = dict(parameters or {})
    weights = {name: f"{name}.weight" for name in ranks if parameters and ROUTER.search(name)}
    parameters |= {weight: ranks[name] for name, weight in weights.items()}
    holders = {name.rpartition(".")[0] for name in parameters}  # PEFT takes none of them for a module
    ranks = {name: rank for name, rank in ranks.items() if name not in weights}
    every = {**ranks, **(tied or {}), **parameters}
    largest = max(every.values())
    by_rank: dict[int, list[str]] = {}
    for name, rank in every.items():
        by_rank.setdefault(rank, []).append(name)
    pattern = {
        key_for(names, [name for name in every if every[name] != rank]): rank
        for rank, names in sorted(by_rank.items(), reverse=True)
        if rank != largest
    }
    return {
        "peft_type": "LORA",
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
        **inherited(config),
        **(
            target_fields(ranks, {} if any(selects(config, name) for name in holders) else config) if ranks else NOTHING
        ),
        **({"target_parameters": ends_of(parameters)} if parameters else {}),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
