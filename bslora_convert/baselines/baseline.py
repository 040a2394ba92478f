"""What every other form of an adapter has in common: a fit within a number of parameters, and what it makes of each module."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from bslora_convert.errors import RecipeError
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.names import kind_of, layer_of


class OutOfReach(RecipeError):
    """A form that can't be made as small (or as large) as was asked."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A form fitted to an adapter.

    deltas: each module's update as the form's stored numbers make it, factors (out, R), (R, in), float32 at least.
    parameters: stored numbers; a shared one counts once, one that a seed makes again does not count.
    settings: the form's own sizes (rank, size of a bank), for the reader.
    bytes: of a form whose numbers are in codes; None where each takes the storage dtype.
    save: writes it as an adapter that PEFT loads, given a directory and the source's raw `adapter_config.json`; None where
    a LoRA of the deltas is it.
    times: of a form in codes, a module's update times a number, as its stored scales take it.
    in_full: of a form against A's random initialisation, the same with what training changed in A stored as large as it is; what
    is unbiased begins with it.
    note: what a reader is told beside the settings.
    """

    deltas: Mapping[str, Factors]
    parameters: int
    settings: Mapping[str, Any]
    save: Callable[[Path, Mapping[str, Any]], None] | None = None
    bytes: int | None = None
    times: Callable[[str, float], Factors] | None = None
    in_full: "Callable[[], Fitted] | None" = None
    note: str = ""


class Fitter(Protocol):
    """The least-squares fit of one form."""

    def __call__(self, source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
        """The best form found that stores at most `budget` numbers of the dtype `storage`.

        :raises OutOfReach: when even the least form stores more.
        """


@dataclass(frozen=True, slots=True)
class Made(Mapping[str, Factors]):
    """Modules' factors that are made when asked for: written out, a form with wide random factors takes gigabytes."""

    names: Sequence[str]
    make: Callable[[str], Factors]

    def __getitem__(self, name: str) -> Factors:
        return self.make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def rounded(tensor: Tensor, storage: torch.dtype) -> Tensor:
    """The numbers as they come back from a file of this dtype, float32 at least."""
    return tensor.to(storage).to(torch.promote_types(storage, torch.float32))


def kinds(source: Source) -> dict[tuple[str, Shape], list[str]]:
    """Modules that methods which share across layers tie together: one kind (`mlp.up_proj`) of one shape, in order.

    A module outside of numbered layers, or an embedding, is a kind of its own.
    """
    found: dict[tuple[str, Shape], list[str]] = {}
    for name, shape in source.shapes.items():
        alone = layer_of(name) is None or source.kind(name) != "linear"
        found.setdefault((name if alone else kind_of(name), shape), []).append(name)
    return found


def largest(cost: Callable[[int], int], budget: int, limit: int, form: str, unit: str = "numbers") -> int:
    """The largest rank from 1 to `limit` whose cost is at most `budget`, in units of both; cost grows with the rank.

    :raises OutOfReach: when rank 1 costs more.
    """
    if cost(1) > budget:
        raise OutOfReach(f"{form} needs {cost(1)} {unit} at least, the budget is {budget}")
    low, high = 1, max(limit, 1)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= budget else (low, middle - 1)
    return low
