"""Weights that a file holds whole beside the factors: saved embeddings, heads and norms. Each is there once.

PEFT wraps a saved module, and on a vocabulary that was resized it saves the wrapper's names as well:

    X.weight                        what the adapter does, and what PEFT loads
    X.modules_to_save.weight        the same again
    X.original_module.weight        the base's own, which every base has
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bslora_convert.errors import InputError
from bslora_convert.files.record import named
from bslora_convert.files.tensorfile import FLOATS, dtype_name

TOKENS = ".token_adapter.trainable_tokens_delta"
WRAPPED = re.compile(r"(?P<module>.+)\.(?P<of>modules_to_save|original_module)(?:\.default)?\.(?P<tensor>.+)")
FEW = 0.1  # of a file's bytes


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of an embedding that were trained (`trainable_token_indices`): values (rows, dim) stand in the place of the base's."""

    indices: tuple[int, ...]
    values: Tensor


def with_rows(carried: Mapping[str, Tensor], config: Mapping[str, Any], where: object) -> dict[str, Tensor | Rows]:
    """What an adapter carries, trained rows as what they do to `<embedding>.weight`.

    :raises InputError: when the configuration does not say which rows they are.
    """
    asked = config.get("trainable_token_indices")
    found: dict[str, Tensor | Rows] = {}
    for name, tensor in carried.items():
        module = name.removesuffix(TOKENS)
        if module == name:
            found[name] = tensor
            continue
        by_module = asked if isinstance(asked, dict) else {module: asked}
        rows = next((rows for key, rows in by_module.items() if f".{module}".endswith(f".{key}")), None)
        if (
            not isinstance(rows, list)
            or len(rows) != len(tensor)
            or not all(type(row) is int and row >= 0 for row in rows)
        ):
            raise InputError(
                f"{where}: {name} holds {len(tensor)} rows, and trainable_token_indices does not say which"
            )
        found[f"{module}.weight"] = Rows(tuple(rows), tensor)
    return found


def kept_once(carried: Mapping[str, Tensor], where: object) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What a file carries, each weight once and under its own name; and notes on what was left out.

    :raises InputError: when two copies of a saved weight differ.
    """
    wrapped = {name: match for name in carried if (match := WRAPPED.fullmatch(name))}
    kept = {name: tensor for name, tensor in carried.items() if name not in wrapped}
    again, bases = [], []
    for name, match in wrapped.items():
        own = f"{match['module']}.{match['tensor']}"
        if match["of"] == "original_module":
            bases.append(name)
        elif own not in kept:
            kept[own] = carried[name]
        elif kept[own].shape == carried[name].shape and (kept[own].is_meta or torch.equal(kept[own], carried[name])):
            again.append(name)
        else:
            raise InputError(f"{where}: {own} and {name} are two saved weights of one module, and they differ")
    notes = []
    if again or bases:
        size = sum(carried[name].nbytes for name in (*again, *bases))
        notes.append(f"left out, {size:,} bytes: " + " and ".join(filter(None, (_copies(again), _bases(bases)))))
    return kept, tuple(notes)


def stored_as(carried: Mapping[str, Tensor], dtype: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """What a file carries with its float matrices in a type, and a note on what that changes; as they are for `auto`.

    :raises InputError: when a number is too large for the type.
    """
    if dtype == "auto":
        return dict(carried), ()
    wanted: torch.dtype = getattr(torch, dtype)
    lost, total, found = 0.0, 0.0, {}
    for name, tensor in carried.items():
        if (
            tensor.ndim != 2
            or tensor.dtype not in FLOATS
            or tensor.dtype.itemsize < wanted.itemsize
            or tensor.dtype == wanted
        ):
            found[name] = tensor
            continue
        found[name] = cast = tensor.to(wanted)
        if not bool(cast.isfinite().all()) and bool(tensor.isfinite().all()):
            raise InputError(f"{name}: {dtype} can't hold some of its numbers; bfloat16 and float32 can")
        lost += float((cast.double() - tensor.double()).square().sum())
        total += float(tensor.double().square().sum())
    error = (lost / total) ** 0.5 if total else 0.0
    return found, (f"whole weights are stored in {dtype}, a relative error of {error:.2g}",) if lost else ()


def taken(carried: Mapping[str, Tensor], size: int) -> tuple[str, ...]:
    """A note on what whole weights take of a file of so many bytes, where that is much."""
    whole = sum(tensor.nbytes for tensor in carried.values())
    if whole <= FEW * size:
        return ()
    types = sorted({dtype_name(tensor.dtype) for tensor in carried.values()})
    return (
        f"{named(sorted(carried))} are whole weights, which are not compressed: {whole:,} bytes in {' and '.join(types)}, "
        f"{whole / size:.0%} of the result; --bytes is a share of the rest, and --tables stores them in a smaller type",
    )


def _copies(names: list[str]) -> str:
    return f"second copies of saved weights ({named(names)})" if names else ""


def _bases(names: list[str]) -> str:
    return f"the base's own weights ({named(names)})" if names else ""
