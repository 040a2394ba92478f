"""What a model calls an adapter's modules: their names change with transformers' versions, and experts are stacked.

PEFT maps a LoRA's names by transformers' table when it loads one; here the same table is read for compact adapters.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bslora_convert.errors import InputError
from bslora_convert.lora.fused import in_fused

NUMBER = re.compile(r"\.(\d+)\.(?=[^.]+$)")  # of the expert: the last number of the name
WEIGHT = "weight"
STACKING = frozenset({"MergeModulelist", "Concatenate"})


@dataclass(frozen=True, slots=True)
class StackSlice:
    """One expert's share of a stacked parameter: `holder.parameter[expert]`, the part-th of `parts` blocks of rows.

    expert: None where the parameter is a matrix and all of it is meant, a router's for instance.
    is_plain: whether stacking is all that was done to it. transposed: whether the parameter holds (in, out) of each expert.
    """

    holder: str
    parameter: str
    expert: int | None
    part: int
    parts: int
    is_plain: bool
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model has one module of an adapter: a layer of this name, or a slice that would have it."""

    name: str
    slice: StackSlice | None = None

    @property
    def child(self) -> list[str]:
        """The parts of the name below the module that is to be changed."""
        return self.name.removeprefix(f"{self.layer}.").split(".") if self.slice else []

    @property
    def layer(self) -> str:
        """The module of the model that is to be changed."""
        return self.name if self.slice is None else self.slice.holder


def places(names: Iterable[str], model: nn.Module) -> dict[str, Place]:
    """Where a model has these modules; those that it has nowhere are left out."""
    layers = {name for name, _ in model.named_modules()}
    names = list(names)
    found = {name: Place(name) for name in names if name in layers and not _is_slice(name, model)}
    missing = [name for name in names if name not in found]
    whole = {
        name: Place(name) for name in missing if name.removesuffix(f".{WEIGHT}") in layers and name.endswith(WEIGHT)
    }
    found |= {name: Place(name.removesuffix(f".{WEIGHT}")) for name in whole}
    found |= _experts([name for name in missing if name not in whole], model, layers)
    missing = [name for name in missing if name not in found]
    if missing:
        found |= _mapped(missing, model, layers)
    return {name: _as_matrix(place, model) for name, place in found.items()}


def layers_of(names: Iterable[str], model: nn.Module) -> dict[str, nn.Module]:
    """A model's layers by the adapter's names, whose inputs can be watched.

    :raises InputError: for experts of a layer that stacks them, which have no inputs of their own.
    """
    found = places(names, model)
    stacked = next((name for name, place in found.items() if place.slice is not None), None)
    if stacked is not None:
        raise InputError(
            f"{stacked}: this model stacks its experts, so what one of them is fed can't be read; leave --prompts out"
        )
    return {name: model.get_submodule(place.name) for name, place in found.items()}


def tied_heads(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that share the input embedding's weight, by PEFT's rule: the head, unless the configuration says otherwise."""
    config: Any = getattr(model, "config", None)
    tied: Any = getattr(model, "_tied_weights_keys", None)
    if not tied or getattr(config, "tie_word_embeddings", None) is False:
        return {}
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    return {name: module for name, module in model.named_modules() if module is head and name}


def is_input_embedding(model: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer is the one that a tied head shares its weight with."""
    find: Any = getattr(model, "get_input_embeddings", None)
    return find is not None and find() is layer


def _as_matrix(place: Place, model: nn.Module) -> Place:
    """A layer that is no linear one but holds a matrix, as a router under transformers 5 does, by its parameter."""
    layer: Any = model.get_submodule(place.layer)
    layer = getattr(layer, "base_layer", layer)
    plain = isinstance(layer, nn.Embedding) or any(hasattr(layer, size) for size in ("in_features", "nx"))
    weight = getattr(layer, WEIGHT, None)
    if place.slice is not None or plain or not isinstance(weight, Tensor) or weight.ndim != 2:
        return place
    return Place(f"{place.name}.{WEIGHT}", StackSlice(place.name, WEIGHT, None, 0, 1, is_plain=True))


def _is_slice(name: str, model: nn.Module) -> bool:
    """Whether a tuner made a module of this name for an expert of a stacked parameter."""
    return bool(getattr(model.get_submodule(name), "is_expert", False))


def _experts(names: list[str], model: nn.Module, layers: set[str]) -> dict[str, Place]:
    """Experts of a parameter that holds all of a layer's, by its own name: `<holder>.<parameter>.<number>`."""
    found = {}
    for name, (holder, parameter, number) in in_fused(names).items():
        if holder not in layers:
            continue
        module: Any = model.get_submodule(holder)
        module = getattr(module, "base_layer", module)
        if getattr(getattr(module, parameter, None), "ndim", 0) == 3:
            transposed = bool(getattr(module, "is_transposed", False))
            found[name] = Place(name, StackSlice(holder, parameter, number, 0, 1, is_plain=True, transposed=transposed))
    return found


def _mapped(names: list[str], model: nn.Module, layers: set[str]) -> dict[str, Place]:
    """By transformers' table of names."""
    if not hasattr(getattr(model, "config", None), "model_type"):
        return {}
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError:  # transformers 4
        return _mapped_by_class(names, model, layers)
    table = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    renamings = [entry for entry in table if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in table if isinstance(entry, WeightConverter)]
    prefix = str(getattr(model, "base_model_prefix", ""))
    found: dict[str, Place] = {}
    for name in names:
        key, pattern = rename_source_key(f"{name}.weight", renamings, converters)
        if pattern is None:
            renamed = _known(key.removesuffix(".weight"), prefix, layers)
            if renamed is not None:
                found[name] = Place(renamed)
            continue
        converter = next(entry for entry in converters if pattern in entry.source_patterns)
        number = NUMBER.search(name)
        holder, _, parameter = key.rpartition(".")
        if number is None or holder not in layers:
            continue
        plain = {type(operation).__name__ for operation in converter.operations} <= STACKING
        place = converter.source_patterns.index(pattern), len(converter.source_patterns)
        slice_ = StackSlice(holder, parameter, int(number[1]), *place, is_plain=plain)
        found[name] = Place(f"{holder}.{number[1]}.{name.rpartition('.')[2]}", slice_)
    return found


def _mapped_by_class(names: list[str], model: nn.Module, layers: set[str]) -> dict[str, Place]:
    table: Any = getattr(model, "_checkpoint_conversion_mapping", None) or {}
    found = {}
    for name in names:
        renamed = name
        for pattern, replacement in table.items():
            renamed, count = re.subn(pattern, replacement, renamed)
            if count:
                break
        if renamed in layers:
            found[name] = Place(renamed)
    return found


def _known(name: str, prefix: str, layers: set[str]) -> str | None:
    """A name as the model has it, with or without the prefix of its base."""
    return next(
        (known for known in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if known in layers), None
    )
