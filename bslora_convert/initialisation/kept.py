"""Draws that files of codes are read against: generated once a process for all adapters of one pipeline, and checked.

A file names its seed, a place for each module and a checksum, CRC-32 over the CRC-32 of each module's draws. What it names may be
hostile, so that it is bounded before anything is drawn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from zlib import crc32

import numpy as np

from bslora_convert.initialisation.stream import Place, Stream
from bslora_convert.modules.factors import Shape

KEPT_BYTES = 1 << 30  # of draws that stay in memory
FARTHEST = 1 << 28  # draws before an adapter's own that are looked at, its modules' own draws not counted
APART = 64  # times a module's numbers that may lie between its draws and those of the module before it

Span = tuple[int, int]  # first draw, count


@dataclass(frozen=True, slots=True)
class Origin:
    """What draws come from, and their checksum.

    seed: of MT19937 (`stream`).
    """

    seed: int
    checksum: int


@dataclass(slots=True)
class _Kept:
    """Draws of one seed by span, with the CRC-32 of each."""

    draws: dict[Span, tuple[np.ndarray, int]]

    @property
    def bytes(self) -> int:
        return sum(numbers.nbytes for numbers, _ in self.draws.values())

    def complete(self, seed: int, spans: Sequence[Span]) -> None:
        """Generates what is missing, in one pass over the stream."""
        stream, at = Stream(seed), 0
        for first, count in sorted(set(spans) - set(self.draws)):
            if first < at:  # spans that overlap are of no real adapter, but they are no harm
                stream, at = Stream(seed), 0
            stream.skip(first - at)
            numbers = stream.take(count)
            at = first + count
            self.draws[first, count] = numbers, crc32(np.ascontiguousarray(numbers, dtype="<i2").data)


_kept: dict[int, _Kept] = {}
_lock = Lock()


def draws_at(seed: int, spans: Sequence[Span]) -> tuple[list[np.ndarray], int]:
    """The draws of each span, (count,) int16, and the checksum of all of them in the order of the stream."""
    with _lock:
        kept = _kept.pop(seed, None) or _Kept({})
        if any(span not in kept.draws for span in spans):
            kept.complete(seed, spans)
        _kept[seed] = kept
        while len(_kept) > 1 and sum(one.bytes for one in _kept.values()) > KEPT_BYTES:
            del _kept[next(iter(_kept))]
        found = {span: kept.draws[span] for span in sorted(spans)}
    total = 0
    for _, check in found.values():
        total = crc32(check.to_bytes(4, "little"), total)
    return [found[span][0] for span in spans], total


def are_allowed(places: Mapping[str, Place], shapes: Mapping[str, Shape]) -> bool:
    """Whether an adapter of these shapes (out, in) may have its draws there: not absurdly far into the stream."""
    own = sum(place.rank * sum(shapes[name]) for name, place in places.items())
    farthest = FARTHEST + APART * own
    return all(place.first + place.rank * shapes[name][1] <= farthest for name, place in places.items())
