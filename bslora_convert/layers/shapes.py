"""What an adapter needs of a base model: layers of the right names and shapes."""

from collections.abc import Iterable, Mapping
from typing import cast

from torch import Tensor, nn

from bslora_convert.bslora.layout import Entry
from bslora_convert.errors import InputError
from bslora_convert.layers.names import Place, StackSlice, places
from bslora_convert.modules.factors import Shape

NAMED = 3  # missing modules that an error names


def layer_shape(layer: nn.Module) -> Shape | None:
    """(out, in) of a layer that an adapter can be added to, quantised ones and transformers' Conv1D among them, else None.

    An embedding maps its vocabulary to its dimension: (dim, vocabulary).
    """
    if isinstance(layer, nn.Embedding):
        return layer.embedding_dim, layer.num_embeddings
    out, width = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if out is None or width is None:
        out, width = getattr(layer, "nf", None), getattr(layer, "nx", None)
    return (int(out), int(width)) if out is not None and width is not None else None


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its weight as (in, out): transformers' Conv1D and embeddings."""
    return hasattr(layer, "nf") or isinstance(layer, nn.Embedding)


def check_fits(modules: Mapping[str, Entry], model: nn.Module, what: object) -> dict[str, Place]:
    """Where a base model has an adapter's modules; a model that the adapter was not made for is refused.

    :raises InputError: naming the first modules that are missing or have another shape.
    """
    found = places(modules, model)
    missing = [name for name in modules if name not in found]
    if missing:
        raise InputError(
            f"{what}: the base model has no {_named(missing)}; "
            f"{len(missing)} of {len(modules)} adapted modules are missing, so the adapter was made for another model"
        )
    layers = dict(model.named_modules())
    for name, entry in modules.items():
        place = found[name]
        layer = cast(nn.Module, getattr(layers[place.layer], "base_layer", layers[place.layer]))
        shape = layer_shape(layer) if place.slice is None else _slice_shape(layer, place.slice, name, what)
        if shape is None:
            raise InputError(f"{what}: {name} is a {type(layer).__name__} in the base model, which can't be adapted")
        if shape != entry.shape:
            raise InputError(
                f"{what}: {name} is {shape[0]} x {shape[1]} in the base model, {entry.shape[0]} x {entry.shape[1]} in the "
                "adapter; it was made for a model of another size"
            )
    return found


def _slice_shape(holder: nn.Module, place: StackSlice, name: str, what: object) -> Shape | None:
    """(out, in) of one expert's part of a stacked parameter; None where that expert is missing.

    :raises InputError: when the experts were not only stacked.
    """
    weight = getattr(holder, place.parameter, None)
    if place.expert is None and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    if not place.is_plain or not isinstance(weight, Tensor) or weight.ndim != 3:
        raise InputError(
            f"{what}: {name} is one expert's adapter, and the base model holds its experts fused in {place.holder} in a way that "
            "compact adapters can't be put on; `expand` it and load the LoRA with PEFT"
        )
    experts, rows, width = weight.shape if not place.transposed else weight.mT.shape
    return (rows // place.parts, width) if (place.expert or 0) < experts else None


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + ("…" if len(names) > NAMED else "")
