"""The numbers that PEFT draws A from, generated again on any machine.

    x_0, x_1, …     32-bit outputs of MT19937, seeded by init_genrand(seed mod 2³²)        Matsumoto and Nishimura, 1998
    uniform_(−b, b) torch's on a CPU: one output a float, (x mod 2²⁴) 2⁻²⁴ · 2b − b, in the order of memory
    d_i = (x_i ≫ 8) mod 2¹⁶ − 2¹⁵       the upper 16 of those 24 bits, int16:        uniform ≈ b · d / 2¹⁵

Sixteen bits are within 2⁻¹⁵ b of the float, as near as bfloat16 numbers are to each other, at half of a float's memory; a factor
such as b is left to whoever uses the draws. Whole numbers have no rounding, so that they are the same for every reader.

A seed alone is a stream of 32 bits' worth of state. NumPy's `RandomState` is frozen (NEP 19): its outputs never change.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from zlib import crc32

import numpy as np

AT_ONCE = 1 << 20  # outputs
HALF = 1 << 15
SEEDS = 1 << 32  # seeds that MT19937 tells apart


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's A₀ (rank, in) stands in a stream: its first draw counts from 0, its rows follow each other."""

    first: int
    rank: int


class Stream:
    """The draws of one seed, in order."""

    def __init__(self, seed: int) -> None:
        self._outputs = np.random.RandomState(seed % SEEDS)

    def take(self, count: int) -> np.ndarray:
        """The next draws: (count,) int16."""
        outputs = self._outputs.randint(0, SEEDS, size=count, dtype=np.uint32)
        return ((outputs >> 8).astype(np.uint16) ^ np.uint16(HALF)).view(np.int16)

    def skip(self, count: int) -> None:
        """Leaves out the next draws."""
        for begin in range(0, count, AT_ONCE):
            self._outputs.randint(0, SEEDS, size=min(AT_ONCE, count - begin), dtype=np.uint32)


def draws(seed: int, places: Mapping[str, Place], widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """A₀ (rank, in) int16 of every module that has a place, in the order of the stream; `in` from widths.

    Places must not overlap.
    """
    stream, at, found = Stream(seed), 0, {}
    for name, place in sorted(places.items(), key=lambda item: item[1].first):
        stream.skip(place.first - at)
        found[name] = stream.take(place.rank * widths[name]).reshape(place.rank, -1)
        at = place.first + found[name].size
    return found


def checksum(found: Mapping[str, np.ndarray]) -> int:
    """CRC-32 of draws as little-endian bytes, modules in the order of the mapping."""
    total = 0
    for numbers in found.values():
        total = crc32(np.ascontiguousarray(numbers, dtype="<i2").data, total)
    return total


def chunks(seed: int, size: int, overlap: int) -> Iterator[np.ndarray]:
    """The stream in pieces of `size`, each but the first beginning with the last `overlap` draws of the one before."""
    stream = Stream(seed)
    held = stream.take(size)
    while True:
        yield held
        held = np.concatenate([held[-overlap:], stream.take(size - overlap)]) if overlap else stream.take(size)
