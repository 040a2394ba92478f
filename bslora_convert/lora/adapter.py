"""A PEFT LoRA adapter on disk -> `LoraAdapter`: factors by module name, scaling kept exact beside them.

The tensors are the truth about which modules are adapted and at which rank; the configuration gives the scaling. Tensors that
are not LoRA factors (saved heads, embedding tables) are carried along untouched.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.errors import InputError, Refused
from bslora_convert.files.address import resolve
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.tensorfile import (
    FLOATS,
    check_finite,
    check_not_empty,
    check_passenger,
    dtype_name,
    read_headers,
    read_tensors,
)
from bslora_convert.lora.config import LoraConfig, given, refuse_unless_convertible
from bslora_convert.lora.damage import damage
from bslora_convert.lora.fields import KNOWN
from bslora_convert.lora.fused import each_expert, parameters_of
from bslora_convert.lora.keys import EMBEDDING_FACTOR, FACTOR, names_of
from bslora_convert.lora.module import LoraModule
from bslora_convert.lora.place import CONFIG_NAME, WEIGHTS_NAMES, locate, refuse_by_keys
from bslora_convert.lora.tables import kept_once
from bslora_convert.lora.targets import ties_targets
from bslora_convert.lora.tying import tied
from bslora_convert.modules.names import natural_order

__all__ = ["CONFIG_NAME", "FOREIGN", "WEIGHTS_NAMES", "LoraAdapter", "LoraModule", "load_lora", "locate"]

LARGEST_SCALING = 1e6

# Tensors beside the factors that change what the factors mean.
FOREIGN = {
    "lora_magnitude_vector": "DoRA rescales the base weight, so its update is not B·A",
    "lora_B.bias": "lora_bias adds a bias that low-rank factors can't hold",
    "lora_E": "AdaLoRA holds a third factor; merge it into its base model instead",
    "lora_diag": "KaSA holds a third factor",
    "lora_ranknum": "AdaLoRA holds a third factor; merge it into its base model instead",
}


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A whole adapter. `carried` holds the tensors that are not factors, `notes` what a reader should know."""

    path: Path
    weights: Path
    config: LoraConfig
    modules: Mapping[str, LoraModule]
    carried: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Stored numbers of the factors; carried tensors don't count."""
        return sum(module.b.numel() + module.a.numel() for module in self.modules.values())

    @property
    def kinds(self) -> dict[str, str]:
        """`linear` or `embedding`, by module."""
        return {name: module.kind for name, module in self.modules.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the factors' numbers are stored in."""
        counts: dict[torch.dtype, int] = {}
        for module in self.modules.values():
            for tensor in (module.b, module.a):
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        return max(counts, key=lambda dtype: counts[dtype])

    def to(self, device: torch.device | str) -> "LoraAdapter":
        """The adapter with its factors on a device."""
        moved = {
            name: replace(module, b=module.b.to(device), a=module.a.to(device)) for name, module in self.modules.items()
        }
        return replace(self, modules=moved)


def load_lora(
    path: str | Path,
    *,
    alpha: float | None = None,
    rslora: bool | None = None,
    ignore: Collection[str] = (),
    headers_only: bool = False,
) -> LoraAdapter:
    """Reads a PEFT LoRA directory, or one of its weight files.

    alpha, rslora: `lora_alpha` and `use_rslora` of an adapter whose configuration lacks them. ignore: settings of the
    configuration that are not known here, and that the caller answers for.
    headers_only: everything is checked but the numbers, which are not read; the factors are meta tensors.

    :raises InputError: when a file is missing, damaged or inconsistent, or nobody knows the scaling; the message names file and
        tensor or field.
    :raises Refused: when the adapter is valid but not a plain LoRA.
    """
    directory, weights = locate(resolve(path))
    config_path = directory / CONFIG_NAME
    raw = given(read_json(config_path), config_path, alpha, rslora)
    refuse_unless_convertible(raw, config_path, ignore)
    tensors = read_headers(weights) if headers_only else read_tensors(weights)
    refuse_by_keys(weights, tensors)
    keys, wrappers = names_of(tensors)
    factors, kinds, carried = _sort(weights, tensors, keys)
    carried, left = kept_once(carried, weights)
    _refuse_biases(raw, carried, config_path)
    guessed = _guessed(raw, factors)
    config = LoraConfig.parse({**raw, **guessed}, config_path)
    apart, called = _each_expert(factors, config, weights)
    names = sorted(apart, key=natural_order)
    modules = {
        name: _module(weights, name, apart[name], kinds.get(name, "linear"), config, called.get(name, name))
        for name in names
    }
    if not modules:
        raise InputError(f"{weights}: holds no LoRA factors (keys ending in lora_A.weight and lora_B.weight)")
    stored = len(modules)
    if ties_targets(config.raw):
        modules = tied(modules, config, config_path)
    notes = (
        *(f"{field} is missing in the configuration; {value!r}, by the tensors" for field, value in guessed.items()),
        *_ignored(raw, ignore),
        *(f"the keys hold {name}, a wrapper's name, which was left out" for name in wrappers),
        *(
            ("ensure_weight_tying: the head's copy of the embedding's factors is counted once",)
            if len(modules) < stored
            else ()
        ),
        *_notes(modules, config, path, directory, called),
        *left,
        *damage(modules, carried),
    )
    return LoraAdapter(Path(path), weights, config, modules, carried, notes)


def _ignored(raw: Mapping[str, Any], names: Collection[str]) -> Iterator[str]:
    """What became of settings that were to be left out."""
    for name in names:
        if name in KNOWN:
            yield f"{name} was to be left out, and is not: it is known here"
        else:
            yield (
                f"{name} of the configuration was left out, as asked"
                if name in raw
                else f"{name} is not in the configuration"
            )


def _guessed(raw: Mapping[str, Any], factors: Mapping[str, Mapping[str, tuple[str, Tensor]]]) -> dict[str, Any]:
    """What the tensors say in place of fields that are missing: the method, and the rank of most modules."""
    ranks = Counter(
        sides["A"][1].shape[0]
        for sides in factors.values()
        if "A" in sides and sides["A"][1].ndim and len(sides["A"][1])
    )
    said: dict[str, Any] = {"peft_type": "LORA"} if "peft_type" not in raw and factors else {}
    return said | ({"r": ranks.most_common(1)[0][0]} if raw.get("r") is None and ranks else {})


def _refuse_biases(raw: Mapping[str, Any], carried: Mapping[str, Tensor], config_path: Path) -> None:
    """Refuses biases that were trained beside the factors: the tensors say whether there are any."""
    saved = raw.get("modules_to_save")
    heads = [name for name in saved if isinstance(name, str)] if isinstance(saved, list) else []
    trained = [
        name for name in carried if name.endswith(".bias") and not any(f".{head}." in f".{name}" for head in heads)
    ]
    if trained and raw.get("bias") not in (None, "none"):
        raise Refused(
            f"{config_path}: bias is {raw['bias']!r} and the weights hold {trained[0]}: trained biases are not part of B·A"
        )


def _sort(
    path: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str]
) -> tuple[dict[str, dict[str, tuple[str, Tensor]]], dict[str, str], dict[str, Tensor]]:
    """Factors by module and side (with their keys), the kind of each module, and everything else."""
    factors: dict[str, dict[str, tuple[str, Tensor]]] = {}
    kinds: dict[str, str] = {}
    carried: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = names[key]
        for marker, why in FOREIGN.items():
            if name.endswith(marker) or f".{marker}." in name:
                raise Refused(f"{path}: tensor {key}: {why}")
        linear, embedding = FACTOR.match(name), EMBEDDING_FACTOR.match(name)
        match = linear or embedding
        if match is None:
            if ".lora_" in name:
                raise Refused(f"{path}: tensor {key}: not a LoRA factor that this version knows")
            if name in carried:
                raise InputError(f"{path}: tensor {key}: a second tensor for {name} in one file")
            check_passenger(path, key, tensor)
            carried[name] = tensor
            continue
        module = match["module"]
        if match["side"] in factors.setdefault(module, {}):
            raise InputError(f"{path}: tensor {key}: a second adapter for the same module in one file")
        factors[module][match["side"]] = (key, tensor)
        kinds[module] = "linear" if linear else "embedding"
    return factors, kinds, carried


def _each_expert(
    factors: Mapping[str, Mapping[str, tuple[str, Tensor]]], config: LoraConfig, path: Path
) -> tuple[dict[str, Mapping[str, tuple[str, Tensor]]], dict[str, str]]:
    """The factors, each expert of an adapted parameter as a module; and what PEFT matches patterns with in the place of names."""
    targets = config.raw.get("target_parameters")
    parameters = parameters_of(factors, targets, path)
    found: dict[str, Mapping[str, tuple[str, Tensor]]] = {}
    called: dict[str, str] = {}
    for name, sides in factors.items():
        parameter = parameters.get(name)
        if parameter is None or set(sides) != {"A", "B"}:
            found[name] = sides
            if isinstance(targets, list) and any(f".{name}.weight".endswith(f".{target}") for target in targets):
                called[name] = f"{name}.weight"
            continue
        (key_a, a), (key_b, b) = sides["A"], sides["B"]
        check_not_empty(path, key_a, a)
        for expert, own_a, own_b in each_expert(a, b, config.expected_rank(parameter), parameter, path):
            found[expert] = {"A": (key_a, own_a), "B": (key_b, own_b)}
            called[expert] = parameter
    return found, called


def _module(
    path: Path, name: str, sides: Mapping[str, tuple[str, Tensor]], kind: str, config: LoraConfig, called: str
) -> LoraModule:
    if set(sides) != {"A", "B"}:
        (present,) = sides
        missing = "B" if present == "A" else "A"
        raise InputError(f"{path}: tensor {sides[present][0]}: its partner lora_{missing} is missing")
    (key_a, a), (key_b, b) = sides["A"], sides["B"]
    for key, tensor in ((key_a, a), (key_b, b)):
        if tensor.ndim == 3 and a.ndim == 2:
            raise Refused(
                f"{path}: tensor {key} has 3 dimensions beside a matrix {key_a}: factors of a fused QKV layer (PEFT < 0.3); "
                "merge it into its base with that version"
            )
        if tensor.ndim > 2:
            raise Refused(f"{path}: tensor {key} has {tensor.ndim} dimensions: convolution adapters are not converted")
        check_not_empty(path, key, tensor)
        if tensor.ndim < 2:
            raise InputError(f"{path}: tensor {key} has shape {tuple(tensor.shape)}, a matrix is expected")
        if tensor.dtype not in FLOATS:
            raise Refused(f"{path}: tensor {key} is {dtype_name(tensor.dtype)}: not a plain float type")
        check_finite(path, key, tensor)
    if a.shape[0] != b.shape[1]:
        raise InputError(
            f"{path}: {key_a} {tuple(a.shape)} and {key_b} {tuple(b.shape)} disagree about the rank "
            f"({a.shape[0]} and {b.shape[1]})"
        )
    if ".base_layer." in f".{name}.":
        raise Refused(
            f"{path}: {key_a}: a module inside an adapted module (MultiheadAttention) can't change its rank alone"
        )
    scaling = config.scaling(called, b.shape[1])
    if abs(scaling) > LARGEST_SCALING:
        raise InputError(f"{path}: the scaling of {name} is {scaling:g}; no adapter is trained with such a lora_alpha")
    return LoraModule(b, a, scaling, kind)


def _notes(
    modules: Mapping[str, LoraModule], config: LoraConfig, asked: str | Path, directory: Path, called: Mapping[str, str]
) -> tuple[str, ...]:
    notes, raw = [], config.raw
    differing = [
        name for name, module in modules.items() if module.rank != config.expected_rank(called.get(name, name))
    ]
    if differing:
        name = differing[0]
        notes.append(
            f"{len(differing)} of {len(modules)} modules have another rank than the configuration says "
            f"({name}: {modules[name].rank}, not {config.expected_rank(name)}); the tensors are taken as the truth, so its "
            f"scaling is {config.said(name, modules[name].rank)}"
        )
    if Path(asked).is_dir() and Path(asked) != directory:
        notes.append(f"the adapter was found in the sub-folder {directory.name}")
    if raw.get("bias") not in (None, "none"):
        notes.append(f"bias is {raw['bias']!r}, but the weights hold no trained bias; read as none")
    if str(raw.get("init_lora_weights", "")).lower() == "lora_ga":
        notes.append("LoRA-GA changes the base during training; this file alone is read as a plain LoRA, as PEFT does")
    if raw.get("monteclora_config"):
        notes.append("MonteCLoRA's sampling is a training-time setting and was ignored")
    return tuple(notes)
