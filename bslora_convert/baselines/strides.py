"""Sweeps of an alternation that start ahead of where the last one ended: alternation creeps along valleys.

    x_k+1 = sweep(x_k + s_k (x_k − x_k−1))        s grows while that lowers the objective

Where it ends higher than the last sweep it is taken back, and the sweep starts from x_k, so no step raises the objective.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

PATIENCE = 3
TOLERANCE = 3e-3  # share of the objective that so many sweeps together must take off it to be followed by another
FLOOR = 1e-12  # of the energy: below it the objective is rounding
FIRST_STRIDE = 0.5  # how far ahead a sweep starts, as a share of what the last one moved
STRIDE_GROWTH = 1.5
LONGEST_STRIDE = 30.0


class Point(Protocol):
    """What sweeps move."""

    def beyond(self, before: Self, stride: float) -> Self:
        """A point on the line from `before` through this one, `stride` of their distance further on."""


Moved = TypeVar("Moved", bound=Point)
Sweep = Callable[[Moved], tuple[Moved, float]]  # to where one sweep ends, and the objective there


def best_of(
    starts: Sequence[Moved], sweep: Sweep[Moved], energy: float, trial: int, most: int
) -> tuple[Moved, list[float]]:
    """The start that is best after `trial` sweeps, `most` sweeps on, and the objective after each of its sweeps.

    energy: of the target; far below it the objective is rounding.
    """
    trials = [descended(start, sweep, energy, trial) for start in starts]
    point, history = min(trials, key=lambda one: one[1][-1])
    point, further = descended(point, sweep, energy, most - trial)
    return point, history + further


def descended(point: Moved, sweep: Sweep[Moved], energy: float, most: int) -> tuple[Moved, list[float]]:
    """Sweeps until one gains too little, `most` at most, and the objective after each."""
    before, (point, lost) = point, sweep(point)
    history = [lost]
    ahead = FIRST_STRIDE
    for _ in range(most - 1):
        leap, leap_lost = sweep(point.beyond(before, ahead))
        if leap_lost < lost:
            before, point, lost, ahead = point, leap, leap_lost, min(ahead * STRIDE_GROWTH, LONGEST_STRIDE)
        else:
            ahead = FIRST_STRIDE
            before, (point, lost) = point, sweep(point)
        history.append(lost)
        if lost <= FLOOR * energy or (len(history) > PATIENCE and history[-1 - PATIENCE] - lost < TOLERANCE * lost):
            break
    return point, history
