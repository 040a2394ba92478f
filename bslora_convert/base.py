"""What an adapter needs of a base model: layers of the right names and shapes."""

from collections.abc import Iterable, Mapping
from typing import cast

from torch import nn

from bslora_convert.bslora.factors import Shape
from bslora_convert.bslora.layout import Entry
from bslora_convert.errors import InputError

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


def check_fits(modules: Mapping[str, Entry], model: nn.Module, what: object) -> None:
    """Refuses a base model that an adapter was not made for.

    :raises InputError: naming the first modules that are missing or have another shape.
    """
    layers = dict(model.named_modules())
    missing = [name for name in modules if name not in layers]
    if missing:
        raise InputError(
            f"{what}: the base model has no {_named(missing)}; "
            f"{len(missing)} of {len(modules)} adapted modules are missing, so the adapter was made for another model"
        )
    for name, entry in modules.items():
        layer = cast(nn.Module, getattr(layers[name], "base_layer", layers[name]))
        shape = layer_shape(layer)
        if shape is None:
            raise InputError(f"{what}: {name} is a {type(layer).__name__} in the base model, which can't be adapted")
        if shape != entry.shape:
            raise InputError(
                f"{what}: {name} is {shape[0]} x {shape[1]} in the base model, {entry.shape[0]} x {entry.shape[1]} in the "
                "adapter; it was made for a model of another size"
            )


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMED]) + ("…" if len(names) > NAMED else "")
