"""The random initialisation of an adapter: where it comes from, and its numbers."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Self

import torch
from torch import Tensor

from bslora_convert.errors import InputError
from bslora_convert.initialisation.kept import Key, Origin, draws_at
from bslora_convert.initialisation.stream import HALF, SEEDS, Place

READY = 16  # initialisations that are held ready


@dataclass(frozen=True, slots=True)
class Initial:
    """key: the seed of the draws, or the name of the file that holds them. places: of the modules whose A₀ is known.

    draws: their A₀ (rank, in) in whole numbers, int16.
    """

    key: Key
    places: Mapping[str, Place]
    draws: Mapping[str, Tensor]

    @classmethod
    def at(cls, key: Key, places: Mapping[str, Place], widths: Mapping[str, int]) -> Self:
        """The draws at these places. widths: `in` of each module.

        :raises InputError: when they are of a file that was not read.
        """
        key = key % SEEDS if isinstance(key, int) else key
        spans = [(place.first, place.rank * widths[name]) for name, place in places.items()]
        found = zip(places.items(), draws_at(key, spans)[0], strict=True)
        draws = {name: torch.from_numpy(numbers).view(place.rank, -1) for (name, place), numbers in found}
        return cls(key, places, draws)

    def base(self, name: str) -> Tensor | None:
        """A module's A₀ (rank, in), float32 in units of the draw's bound; None where it is not known."""
        return self.draws[name].float() / HALF if name in self.draws else None

    @property
    def origin(self) -> Origin:
        """What a file of codes says of it."""
        spans = [(place.first, self.draws[name].numel()) for name, place in self.places.items()]
        return Origin.of(self.key, draws_at(self.key, spans)[1])

    def only(self, names: Iterable[str]) -> Self | None:
        """That of some modules; None where none of them has it."""
        kept = [name for name in names if name in self.places]
        if not kept:
            return None
        return type(self)(self.key, {n: self.places[n] for n in kept}, {n: self.draws[n] for n in kept})


def read_initial(origin: Origin, places: Mapping[str, Place], widths: Mapping[str, int], where: object) -> Initial:
    """That which a file of codes names; adapters of one pipeline share it.

    :raises InputError: naming `where`, when its draws are not those that the checksum was taken of, or are not there.
    """
    try:
        found, actual = _drawn(origin.key, tuple(places.items()), tuple(widths[name] for name in places))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if actual != origin:
        raise InputError(
            f"{where}: the initialisation {origin.key} is not the one that the codes were made against (its checksum is "
            f"{actual.checksum}, not {origin.checksum}); the adapter is damaged"
        )
    return found


@lru_cache(READY)
def _drawn(key: Key, places: tuple[tuple[str, Place], ...], widths: tuple[int, ...]) -> tuple[Initial, Origin]:
    sizes = {name: width for (name, _), width in zip(places, widths, strict=True)}
    found = Initial.at(key, dict(places), sizes)
    return found, found.origin
