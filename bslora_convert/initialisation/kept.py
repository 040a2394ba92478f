"""Draws that codes are read against: held once a process for all adapters of one pipeline, and checked.

Draws come from a seed (`stream`), or from a file that was read before (`bslora.common`). What codes are read against has a place
for each module and a checksum, CRC-32 over the CRC-32 of each place's draws.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from threading import Lock
from zlib import crc32

import numpy as np

from bslora_convert.errors import InputError
from bslora_convert.initialisation.stream import SEEDS, Place, Stream
from bslora_convert.modules.factors import Shape

KEPT_BYTES = 1 << 30  # of draws of seeds that stay in memory
FARTHEST = 1 << 28  # draws before an adapter's own that are looked at, its modules' own draws not counted
APART = 64  # times a module's numbers that may lie between its draws and those of the module before it

Span = tuple[int, int]  # first draw, count
Key = int | str  # a seed, or the name of a file


@dataclass(frozen=True, slots=True)
class Origin:
    """Where draws come from, one of seed and file, and their checksum."""

    checksum: int
    seed: int | None = None
    file: str | None = None

    @classmethod
    def of(cls, key: Key, checksum: int) -> "Origin":
        """That of a seed or a file's name."""
        return cls(checksum, file=key) if isinstance(key, str) else cls(checksum, seed=key)

    @property
    def key(self) -> Key:
        """The seed, or the name of the file."""
        found = self.seed if self.file is None else self.file
        assert found is not None  # one of them is given
        return found


@dataclass(slots=True)
class _Kept:
    """Draws of one seed or file by span, with the CRC-32 of each. whole: all of a file's, None where a seed is drawn from."""

    whole: np.ndarray | None = None
    spans: dict[Span, tuple[np.ndarray, int]] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        return 0 if self.whole is not None else sum(numbers.nbytes for numbers, _ in self.spans.values())

    def use(self, spans: Sequence[Span]) -> dict[Span, tuple[np.ndarray, int]]:
        """These spans, in the order of the stream; what was used last is kept the longest."""
        found = {span: self.spans.pop(span) for span in sorted(set(spans))}
        self.spans |= found
        return found

    def drop(self, surplus: int, but: Collection[Span]) -> int:
        """Lets go of what was used the longest ago, until so many bytes are free; returns how many are still too many."""
        for span in [span for span in self.spans if span not in but]:
            if surplus <= 0:
                break
            surplus -= self.spans.pop(span)[0].nbytes
        return surplus

    def complete(self, key: Key, spans: Sequence[Span]) -> None:
        """Cuts out, or draws in one pass over the stream, what is missing."""
        missing = sorted(set(spans) - set(self.spans))
        if self.whole is not None:
            for first, count in missing:
                self._take(first, self.whole[first : first + count])
            return
        assert isinstance(key, int)  # files are whole
        stream, at = Stream(key), 0
        for first, count in missing:
            if first < at:  # no adapter has spans that overlap, but two of one seed may
                stream, at = Stream(key), 0
            stream.skip(first - at)
            self._take(first, stream.take(count))
            at = first + count

    def _take(self, first: int, numbers: np.ndarray) -> None:
        check = crc32(np.ascontiguousarray(numbers, dtype="<i2").data)
        self.spans[first, len(numbers)] = numbers, check


_kept: dict[Key, _Kept] = {}
_lock = Lock()


def hold(file: str, numbers: np.ndarray) -> None:
    """Keeps a file's draws, int16, for as long as the process lives; of the same name only the first are taken."""
    with _lock:
        _kept.setdefault(file, _Kept(numbers))


def release(file: str) -> None:
    """Forgets a file's draws."""
    with _lock:
        _kept.pop(file, None)


def is_held(file: str) -> bool:
    """Whether a file's draws are kept."""
    return file in _kept


def draws_at(key: Key, spans: Sequence[Span]) -> tuple[list[np.ndarray], int]:
    """The draws of each span, (count,) int16, and the checksum of all of them in the order of the stream.

    :raises InputError: when they are of a file that has not been read, or that ends before them.
    """
    key = key % SEEDS if isinstance(key, int) else key
    with _lock:
        if isinstance(key, str) and key not in _kept:
            raise InputError(
                f"{key}: the initialisation that the codes were made against was not found beside them or above"
            )
        kept = _kept.pop(key, None) or _Kept()
        _kept[key] = kept
        if kept.whole is not None and any(first + count > len(kept.whole) for first, count in spans):
            raise InputError(f"{key}: ends before the draws that the codes were made against")
        if any(span not in kept.spans for span in spans):
            kept.complete(key, spans)
        found = kept.use(spans)
        surplus = sum(one.bytes for one in _kept.values()) - KEPT_BYTES
        for one in list(_kept.values()) if surplus > 0 else ():
            surplus = one.drop(surplus, found if one is kept else ()) if one.whole is None else surplus
    total = 0
    for _, check in found.values():
        total = crc32(check.to_bytes(4, "little"), total)
    return [found[span][0] for span in spans], total


def are_allowed(places: Iterable[Place], shapes: Iterable[Shape]) -> bool:
    """Whether modules of these shapes (out, in) may have their draws there: not absurdly far into the stream."""
    both = list(zip(places, shapes, strict=True))
    farthest = FARTHEST + APART * sum(place.rank * sum(shape) for place, shape in both)
    return all(place.first + place.rank * max(shape) <= farthest for place, shape in both)
