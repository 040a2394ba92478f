"""What an adapter was before it was trained: where its numbers come from, and these."""

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
    """Where tensors of the form were before training, by their keys (`<module>.bslora_local_A`).

    key: the seed of the draws, or the name of the file that holds them. places: of the tensors whose A₀ (or B₀) is known.
    draws: these, vectors (rank, length) in whole numbers, int16: rows of A₀, columns of B₀.
    """

    key: Key
    places: Mapping[str, Place]
    draws: Mapping[str, Tensor]

    @classmethod
    def at(cls, key: Key, places: Mapping[str, Place], lengths: Mapping[str, int]) -> Self:
        """The draws at these places. lengths: of a vector of each tensor.

        :raises InputError: when they are of a file that was not read.
        """
        key = key % SEEDS if isinstance(key, int) else key
        spans = [(place.first, place.rank * lengths[name]) for name, place in places.items()]
        found = zip(places.items(), draws_at(key, spans)[0], strict=True)
        draws = {name: torch.from_numpy(numbers).view(place.rank, -1) for (name, place), numbers in found}
        return cls(key, places, draws)

    def base(self, module: str, side: str = "A") -> Tensor | None:
        """A module's A₀ (rank, in), or B₀ᵀ (rank, out), float32 in units of the draw's bound; None where it is not known."""
        draws = self.draws.get(tensor_key(module, side))
        return None if draws is None else draws.float() / HALF

    @property
    def modules(self) -> list[str]:
        """Those of which something is known."""
        return list(dict.fromkeys(key.rpartition(".bslora_")[0] for key in self.places))

    @property
    def origin(self) -> Origin:
        """What a file of codes says of it."""
        spans = [(place.first, self.draws[name].numel()) for name, place in self.places.items()]
        return Origin.of(self.key, draws_at(self.key, spans)[1])

    def only(self, keys: Iterable[str]) -> Self | None:
        """That of some tensors; None where none of them has it."""
        kept = [key for key in keys if key in self.places]
        if not kept:
            return None
        return type(self)(self.key, {n: self.places[n] for n in kept}, {n: self.draws[n] for n in kept})


def tensor_key(module: str, side: str = "A") -> str:
    """The key of a module's local A or B."""
    return f"{module}.bslora_local_{side}"


def read_initial(origin: Origin, places: Mapping[str, Place], lengths: Mapping[str, int], where: object) -> Initial:
    """That which a file of codes names; adapters of one pipeline share it.

    :raises InputError: naming `where`, when its draws are not those that the checksum was taken of, or are not there.
    """
    try:
        found, actual = _drawn(origin.key, tuple(places.items()), tuple(lengths[name] for name in places))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if actual != origin:
        raise InputError(
            f"{where}: the initialisation {origin.key} is not the one that the codes were made against (its checksum is "
            f"{actual.checksum}, not {origin.checksum}); the adapter is damaged"
        )
    return found


@lru_cache(READY)
def _drawn(key: Key, places: tuple[tuple[str, Place], ...], lengths: tuple[int, ...]) -> tuple[Initial, Origin]:
    sizes = {name: length for (name, _), length in zip(places, lengths, strict=True)}
    found = Initial.at(key, dict(places), sizes)
    return found, found.origin
