"""The smallest result whose behaviour reaches a limit: a search over sizes that walks over the whole pipeline from outside.

Every measure is turned into what is missed, which a larger file makes less of:

    min_retention   1 − retention        max_kl   KL        min_agreement   1 − agreement

each at its 95 % bound over the rows that choose. What is missed goes with the energy that a size loses, as KL is quadratic in a
small change of the weights:  missed ≈ c · lost(share)^p,  p = 1, and 1/2 for agreement, which goes with the root of the KL. The
first size is a guess; c is taken from the last measurement, until a size that reaches the limit and one that misses it are known;
then the line between the two, in logarithms, gives the next one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from bslora_convert.behaviour.intervals import RULE_OF_THREE, at_least, at_most
from bslora_convert.behaviour.rows import RowSums, resampled_means

Made = TypeVar("Made")

ATTEMPTS = 8
CLOSE = 0.9  # share of what may be missed at which a size is small enough
NARROW = 1.03  # ratio of two sizes between which nothing more is sought
AIMED = 0.95  # share of what may be missed that the next size is aimed at
LARGEST, SMALLEST = 1.0, 1 / 1024  # shares of the source's bytes
EDGE = 0.1  # of what lies between two known sizes: how near to one of them the next may come
FINE = 1.001  # ratio of two sizes that are the same
STEP = 16.0  # most by which a size changes from one attempt to the next
POWER = {"min_retention": 1.0, "max_kl": 1.0, "min_agreement": 0.5}  # p
USUAL = 0.03  # missed retention against lost energy, of adapters that were looked at
USUAL_KL = 0.5  # of the bare base
MOST_LOST = 0.9  # share of the energy that a first guess may lose


@dataclass(frozen=True, slots=True)
class Attempt(Generic[Made]):
    """One size that was tried. share: of the source's bytes, asked for. missed: at its bound; allowed: what may be missed."""

    made: Made
    share: float
    missed: float
    allowed: float

    @property
    def met(self) -> bool:
        """Whether it reaches the limit."""
        return self.missed <= self.allowed


def bound_of(rows: Sequence[RowSums], aim: str, seed: int) -> float:
    """What the measure that an aim is of is at least, or a KL at most, of all rows, with 95 % certainty: by bootstrap over rows.

    Where every token agreed there is nothing to resample: then up to 3 / n of all tokens may differ.
    """
    drawn = resampled_means(rows, seed)
    if aim == "max_kl":
        return at_most(drawn.kl)
    if aim == "min_retention":
        return at_least(drawn.retention)
    return min(at_least(drawn.agreement), 1 - RULE_OF_THREE / sum(row.tokens for row in rows))


def missed_of(aim: str, value: float) -> float:
    """What a value of the measure misses; of a limit, what may be missed."""
    return value if aim == "max_kl" else 1 - value


def first_lost(aim: str, allowed: float) -> float:
    """A guess at the share of the energy that may be lost. allowed: what may be missed."""
    retention = {"min_retention": allowed, "max_kl": allowed / USUAL_KL, "min_agreement": allowed**2}[aim]
    return min(retention / USUAL, MOST_LOST)


def smallest(
    make: Callable[[float], Attempt[Made] | None],
    first: float,
    lost: Callable[[float], float],
    power: float,
) -> tuple[Attempt[Made] | None, list[Attempt[Made]]]:
    """(The smallest attempt that reaches the limit, if one does; all attempts in their order).

    make: an attempt of a share of the source's bytes, None where nothing can be made of so few. lost: the share of the energy
    that a size loses, falling. power: p.
    """
    tried: list[Attempt[Made]] = []
    best: Attempt[Made] | None = None
    worse: Attempt[Made] | None = None  # the largest that misses
    misses = 0
    floor = 0.0  # the largest size that misses, or of which nothing can be made
    share = _within(first)
    for _ in range(ATTEMPTS):
        found = make(share)
        if found is not None:
            tried.append(found)
        if found is not None and found.met:
            best = found if best is None or share < best.share else best
        elif share > floor:
            worse, floor = found, share
        if best is None and floor >= LARGEST:
            break
        if best is not None and (best.missed >= CLOSE * best.allowed or best.share <= max(NARROW * floor, SMALLEST)):
            break
        share = _next(best, worse, floor, lost, power)
        if best is None:  # the further off the model is, the longer the steps, so that the largest is reached
            misses += 1
            share = _within(max(share, 2 ** (misses - 1) * floor))
    return best, tried


def _next(
    best: "Attempt[Made] | None",
    worse: "Attempt[Made] | None",
    floor: float,
    lost: Callable[[float], float],
    power: float,
) -> float:
    """The size to try next: between what is known, or where what is missed should be what may be missed."""
    if best is None and worse is None:
        return _within(2 * floor)
    if best is None or not floor:
        known = best or worse
        assert known is not None  # one of them is
        share = predicted(known, lost, power)
        return _within(max(share, floor * NARROW**2) if best is None else min(share, best.share / NARROW))
    low, high = math.log(floor), math.log(best.share)
    at = (low + high) / 2
    if worse is not None and 0 < best.missed < worse.missed:
        fall = (math.log(worse.missed) - math.log(best.missed)) / (high - low)
        at = low + (math.log(worse.missed) - math.log(AIMED * best.allowed)) / fall
    edge = EDGE * (high - low)
    return math.exp(min(max(at, low + edge), high - edge))


def predicted(known: "Attempt[Made]", lost: Callable[[float], float], power: float) -> float:
    """The size at which c · lost^p is what is aimed at, c by one attempt."""
    factor = AIMED * known.allowed / max(known.missed, 1e-9)
    wanted = lost(known.share) * factor ** (1 / power)
    low, high = _within(known.share / STEP), _within(known.share * STEP)
    while high / low > FINE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if lost(middle) > wanted else (low, middle)
    return high


def _within(share: float) -> float:
    return min(max(share, SMALLEST), LARGEST)
