"""Where a first module is found: seeds at the start of their stream, then some seeds' streams by correlation.

Seeds are tried by how usual they are. Scripts seed with 42 (transformers), 3407 (Unsloth), 0; a head, an embedding or a data
loader's seed may have been drawn before the first module. The default search takes a second or two for an adapter of any size.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from bslora_convert.initialisation.correlate import TOGETHER, Detector
from bslora_convert.initialisation.drawn import Module, passed
from bslora_convert.initialisation.match import FEW, HEAD, LEAST, RMS, Heads, centred, matches
from bslora_convert.initialisation.order import Order
from bslora_convert.initialisation.stream import Stream
from bslora_convert.initialisation.tape import Tape

MOST_USUAL = (42, 3407, 0)
USUAL = (
    *MOST_USUAL,
    1,
    2,
    3,
    123,
    1234,
    1337,
    *range(2021, 2027),
    10,
    100,
    12345,
    67280421310721,
)  # the last is torch's own
LIKELY = (
    *USUAL, 31337, 54321, 123456, 2017, 2018, 2019, 2020, 2027, 2048, 4096, 4242, 8888, 9999,
    *(seed for seed in range(1025) if seed not in USUAL),
)  # fmt: skip
MORE_SEEDS = (
    *(seed for seed in range(1024, 10_000) if seed not in LIKELY), *range(10_000, 100_000, 1111), *range(20_000, 100_000, 1000),
    31415, 314159, 27182, 271828, 65535, 65536, 114514, 424242, 654321, 1234567, 19260817, 8675309, 20230101, 123456789,
    987654321, 1234567890, 0xC0FFEE, 0xDEADBEEF, 0x7FFFFFFF, 0xFFFFFFFF,
)  # fmt: skip
OFFSETS = range(17)  # draws before the first module that are usual: a data loader's seed takes two
AT_ONCE = 1 << 21  # draws that are correlated together
DRAWN = 1 << 28  # draws that starts of streams may take by default: large modules stand far behind their own beginning
LOOKED_FOR = 32  # modules


@dataclass(frozen=True, slots=True)
class Beginning:
    """A module that was found at a place of a seed's stream."""

    tape: Tape
    name: str
    first: int
    cosine: float


class Firsts:
    """The modules of an adapter that may come first, sought at the start of streams and far into them."""

    def __init__(self, order: Order, heads: Heads, embeddings: Iterable[Module]) -> None:
        self._heads = heads
        self._first = self._whole(order.first_of_each())
        early = self._whole(order.first_of_each(2))
        self._early = dict(list(early.items())[: max(len(self._first), TOGETHER)])
        counts = [list(passed(embedding)) for embedding in embeddings]
        self._passed = sorted({0, *(count for both in counts for count in both), sum(both[0] for both in counts)})

    def _whole(self, names: Iterable[str]) -> dict[str, np.ndarray]:
        heads = {name: self._heads.of(name) for name in names if self._heads.modules[name].size >= FEW}
        return dict([(name, head) for name, head in heads.items() if head is not None][:LOOKED_FOR])

    def at_the_start(
        self, seeds: Iterable[int], offsets: Iterable[int], room: int | None = None
    ) -> Iterator[Beginning]:
        """Matches of modules that are drawn first, after one of the offsets; without the last seeds where draws exceed `room`."""
        tries = self._tries(offsets)
        length = max((first for first, _ in tries), default=0) + HEAD
        for number, seed in enumerate(seeds):
            if not tries or (room is not None and (number + 1) * length > room):
                return
            draws = Stream(seed).take(length)
            for (first, size), (names, rows) in tries.items():
                likeness = rows @ centred(draws[first : first + size]) / (RMS * size**0.5)
                for at in np.flatnonzero(likeness >= max(LEAST * 2 / 3, 6 / size**0.5)):
                    yield from self._checked(Tape(seed), first, (names[at],))

    def _tries(self, offsets: Iterable[int]) -> Mapping[tuple[int, int], tuple[list[str], np.ndarray]]:
        """By place and size: the modules that would stand there if they came first."""
        tries: dict[tuple[int, int], list[str]] = {}
        for name, head in self._first.items():
            module = self._heads.modules[name]
            places = {o + p + b + module.lead for o in offsets for p in self._passed for b in (0, module.out)}
            for first in places:
                tries.setdefault((first, len(head)), []).append(name)
        return {key: (names, np.stack([self._first[name] for name in names])) for key, names in tries.items()}

    def further(self, seed: int, begin: int, end: int) -> Iterator[Beginning]:
        """Matches anywhere in a stretch of a seed's stream, in its order."""
        if not self._early:
            return
        tape, detector = Tape(seed), Detector(self._early)
        for at in range(begin, end, AT_ONCE):
            for position, group in detector.peaks(tape.read(at, min(AT_ONCE, end - at) + HEAD)):
                yield from self._checked(tape, at + position, group)

    def _checked(self, tape: Tape, first: int, names: Iterable[str]) -> Iterator[Beginning]:
        for name in names:
            cosine = matches(name, first, self._heads, tape) if first >= self._heads.modules[name].lead else None
            if cosine is not None:
                yield Beginning(tape, name, first, cosine)
