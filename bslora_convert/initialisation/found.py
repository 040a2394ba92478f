"""The random initialisation of an adapter's A's: the seed, and each module's place in its stream of draws."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bslora_convert.initialisation.beginning import (
    DRAWN,
    LIKELY,
    MORE_SEEDS,
    MOST_USUAL,
    OFFSETS,
    USUAL,
    Beginning,
    Firsts,
)
from bslora_convert.initialisation.drawn import Module
from bslora_convert.initialisation.match import HEAD, Heads, look_drawn, matches
from bslora_convert.initialisation.order import Order
from bslora_convert.initialisation.stream import Place
from bslora_convert.initialisation.tape import BLOCK, Tape
from bslora_convert.initialisation.walk import Walk
from bslora_convert.process.progress import Progress, silent

PHASE = "looking for the initialisation"
FAR = 1 << 23  # draws of the most usual seeds that are searched
ASKED = 1 << 25  # of a given seed
THOROUGH = 1 << 27  # of all usual seeds
NEAR = BLOCK - HEAD  # of other usual seeds: one block
BATCH = 512  # seeds between two words of progress
LOOKED_AT = 8  # modules at which an earlier find is tried


@dataclass(frozen=True, slots=True)
class Found:
    """Where A's come from.

    places, cosines: by module, in the order of the stream; the cosine is that of A and its draws.
    offset: draws before the first of these modules' own; 0 where the seed was set right before.
    """

    seed: int
    places: Mapping[str, Place]
    cosines: Mapping[str, float]
    offset: int

    @property
    def cosine(self) -> float:
        """Mean over modules."""
        return sum(self.cosines.values()) / len(self.cosines)


def find(
    modules: Mapping[str, Module],
    *,
    seed: int | None = None,
    thorough: bool = False,
    before: Sequence[Found] = (),
    progress: Progress = silent,
) -> Found | None:
    """The seed and places from which A's were drawn, or None.

    seed: the only one that is tried. before: finds of other adapters, tried first.
    thorough: looks much further into the streams of usual seeds, and at thousands of other seeds; takes minutes.
    """
    linear = {name: module for name, module in modules.items() if module.kind == "linear" and module.size}
    embeddings = [module for module in modules.values() if module.kind == "embedding"]
    heads = Heads(linear)
    again = _again(linear, embeddings, heads, [one for one in before if seed in (None, one.seed)])
    if again is not None:
        return again
    firsts = Firsts(Order(linear), heads, embeddings)
    known = dict.fromkeys((one.seed, one.offset) for one in before if seed in (None, one.seed))
    for begun in _search(firsts, known, seed, thorough, thorough or look_drawn(linear), progress):
        walk = Walk(linear, embeddings, heads, begun.tape)
        walk.place(begun.name, begun.first, begun.cosine)
        return _found(walk, linear, begun.tape)
    return None


def _search(
    firsts: Firsts, known: Iterable[tuple[int, int]], seed: int | None, thorough: bool, far: bool, progress: Progress
) -> Iterator[Beginning]:
    steps = [firsts.at_the_start((one,), (offset,)) for one, offset in known]
    if seed is not None:
        steps += [firsts.at_the_start((seed,), OFFSETS), firsts.further(seed, 0, THOROUGH if thorough else ASKED)]
    else:
        steps += [firsts.at_the_start(USUAL, OFFSETS), firsts.at_the_start(LIKELY, (0,), DRAWN)]
        spans = {one: FAR if one in MOST_USUAL else NEAR for one in USUAL}
        if far:
            steps += [firsts.further(one, 0, span) for one, span in spans.items()]
        if thorough:
            steps += [firsts.at_the_start(batched, (0,)) for batched in _batches((*LIKELY, *MORE_SEEDS))]
            steps += [firsts.further(one, span, THOROUGH) for one, span in spans.items()]
    for done, step in enumerate(steps):
        progress(PHASE, done, len(steps))
        yield from step
    progress(PHASE, len(steps), len(steps))


def _batches(seeds: Sequence[int]) -> Iterator[Sequence[int]]:
    return (seeds[begin : begin + BATCH] for begin in range(0, len(seeds), BATCH))


def _again(
    modules: Mapping[str, Module], embeddings: list[Module], heads: Heads, before: Sequence[Found]
) -> Found | None:
    """A find at an earlier find's places, walked on from there."""
    tapes: dict[int, Tape] = {}
    for earlier in before:
        tape = tapes.setdefault(earlier.seed, Tape(earlier.seed))
        shared = {name: place.first for name, place in earlier.places.items() if name in modules}
        shared = {name: first for name, first in shared.items() if modules[name].rank == earlier.places[name].rank}
        if not any(matches(name, shared[name], heads, tape) is not None for name in list(shared)[:LOOKED_AT]):
            continue
        walk = Walk(modules, embeddings, heads, tape)
        for name, first in shared.items():
            cosine = matches(name, first, heads, tape, predicted=True)
            if cosine is not None:
                walk.place(name, first, cosine)
        return _found(walk, modules, tape)
    return None


def _found(walk: Walk, modules: Mapping[str, Module], tape: Tape) -> Found:
    firsts, cosines = walk.run()
    places = {name: Place(first, modules[name].rank) for name, first in firsts.items()}
    return Found(tape.seed, places, cosines, walk.beginning)
