"""The random initialisation of an adapter: where it comes from, and its numbers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from bslora_convert.initialisation.kept import Origin, draws_at
from bslora_convert.initialisation.stream import HALF, SEEDS, Place


@dataclass(frozen=True, slots=True)
class Initial:
    """seed: of the draws. places: of the modules whose A₀ is known. draws: their A₀ (rank, in) in whole numbers, int16."""

    seed: int
    places: Mapping[str, Place]
    draws: Mapping[str, Tensor]

    @classmethod
    def of_seed(cls, seed: int, places: Mapping[str, Place], widths: Mapping[str, int]) -> Self:
        """Draws these anew; widths: `in` of each module."""
        found, _ = draws_at(seed % SEEDS, [(place.first, place.rank * widths[name]) for name, place in places.items()])
        draws = {
            name: torch.from_numpy(numbers).view(place.rank, -1)
            for (name, place), numbers in zip(places.items(), found, strict=True)
        }
        return cls(seed % SEEDS, places, draws)

    def base(self, name: str) -> Tensor | None:
        """A module's A₀ (rank, in), float32 in units of the draw's bound; None where it is not known."""
        return self.draws[name].float() / HALF if name in self.draws else None

    @property
    def origin(self) -> Origin:
        """What a file says of it."""
        _, total = draws_at(self.seed, [(place.first, self.draws[name].numel()) for name, place in self.places.items()])
        return Origin(self.seed, total)

    def only(self, names: Iterable[str]) -> Self | None:
        """That of some modules; None where none of them has it."""
        kept = [name for name in names if name in self.places]
        if not kept:
            return None
        return type(self)(self.seed, {n: self.places[n] for n in kept}, {n: self.draws[n] for n in kept})
