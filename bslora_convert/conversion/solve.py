"""The one search over sizes: the laxest setting of one knob whose result still keeps to a limit.

    knob s     how strict a trial is; the value v(s) that is limited falls as s grows

                 s                            v(s)                           least cost       lines are drawn in
    error        1 / energy that may be lost  energy that is lost            bits             1/s and v
    bytes        1 / room for codes           bytes of the file              energy lost      1/s and v
    behaviour    share of the source's bytes  what is missed, at its bound   bytes            log s and log v

Of trials that keep to the limit the one of least cost is kept. Until one keeps to it and one does not, the next s follows from
the trials so far by a model that the caller gives (`follow`); then from the line between the two.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """When a search is content. close: share of the limit from which a value is near enough; aimed: share that is sought.

    narrow: ratio of two settings between which nothing more is sought. trials: at most. While none keeps to the limit: stride: by
    which steps grow, as the model is off; misses: after so many the strictest setting is tried. logs: how lines are drawn.
    """

    close: float
    aimed: float
    narrow: float
    trials: int
    stride: float
    misses: int
    logs: bool

    def at(self, setting: float) -> float:
        """Where a setting stands on the line."""
        return math.log(setting) if self.logs else 1 / setting

    def setting(self, at: float) -> float:
        """The setting of a place on the line."""
        return math.exp(at) if self.logs else 1 / at


ERROR = Tolerance(close=0.97, aimed=0.99, narrow=1.001, trials=9, stride=1.0, misses=4, logs=False)
BYTES = Tolerance(close=0.999, aimed=1.0, narrow=1.0001, trials=8, stride=1.0, misses=8, logs=False)
BEHAVIOUR = Tolerance(close=0.9, aimed=0.95, narrow=1.03, trials=8, stride=2.0, misses=8, logs=True)
EDGE = 0.1  # of what lies between two known settings, on the line: how near to one of them the next may come


@dataclass(frozen=True, slots=True)
class Trial(Generic[Made]):
    """What one setting gave. value: what is limited; cost: of those that keep to the limit the least is kept."""

    setting: float
    value: float
    cost: float
    made: Made


Follow = Callable[[Sequence[Trial[Made]], float], float]  # trials, the nearest one last, and a value -> its setting


@dataclass(slots=True)
class Search(Generic[Made]):
    """A search and its trials so far.

    best: of least cost within the limit; lax: the laxest of those. floor: the strictest setting beyond the limit, with its trial,
    None where nothing could be made.
    """

    limit: float
    trials: list[Trial[Made]] = field(default_factory=list)
    best: Trial[Made] | None = None
    lax: Trial[Made] | None = None
    floor: float = 0.0
    beyond: Trial[Made] | None = None

    def take(self, setting: float, trial: Trial[Made] | None) -> None:
        """Takes note of one trial."""
        if trial is not None:
            self.trials.append(trial)
        if trial is not None and trial.value <= self.limit:
            if self.best is None or trial.cost < self.best.cost:
                self.best = trial
            if self.lax is None or setting < self.lax.setting:
                self.lax = trial
        elif setting > self.floor:
            self.beyond, self.floor = trial, setting


def solve_size(
    evaluate: Callable[[float], Trial[Made] | None],
    limit: float,
    first: float,
    follow: Follow[Made],
    tolerance: Tolerance,
    bounds: tuple[float, float] = (0.0, math.inf),
) -> Search[Made]:
    """The search, whose `best` is None where no setting keeps to the limit.

    evaluate: a trial of a setting, None where nothing can be made of one so lax. follow: the setting at which the model, put
    through what is known, has a value. bounds: the laxest and the strictest setting.
    """
    found: Search[Made] = Search(limit)
    laxest, strictest = bounds
    setting = min(max(first, laxest), strictest)
    before: set[tuple[float, float]] = set()
    for count in range(1, tolerance.trials + 1):
        trial = evaluate(setting)
        found.take(setting, trial)
        again = trial is not None and (trial.value, trial.cost) in before
        if _is_over(found, tolerance, bounds) or (again and trial is not None and trial.value <= limit):
            break
        if trial is not None:
            before.add((trial.value, trial.cost))
        if found.lax is None and (again or count >= tolerance.misses) and math.isfinite(strictest):
            setting = strictest  # steps that change nothing, or too many of them
        else:
            setting = min(max(_next(found, count, follow, tolerance), laxest), strictest)
    return found


def _is_over(found: Search[Made], tolerance: Tolerance, bounds: tuple[float, float]) -> bool:
    """Whether nothing better is to be had, or it would hardly be better."""
    if found.lax is None:
        return found.floor >= bounds[1]
    near = found.lax.value >= tolerance.close * found.limit
    return near or found.lax.setting <= max(tolerance.narrow * found.floor, bounds[0])


def _next(found: Search[Made], count: int, follow: Follow[Made], tolerance: Tolerance) -> float:
    """The setting to try next."""
    wanted, lax, beyond = tolerance.aimed * found.limit, found.lax, found.beyond
    if lax is None:
        least = max(tolerance.stride ** (count - 1), tolerance.narrow**2) * found.floor
        return max(least, follow(found.trials, wanted) if beyond is not None else 2 * found.floor)
    if not found.floor:
        return min(follow(found.trials, wanted), lax.setting / tolerance.narrow)
    low, high = tolerance.at(found.floor), tolerance.at(lax.setting)
    share = 0.5  # of the way from the one that is beyond
    if beyond is not None and beyond.value > lax.value and (lax.value > 0 or not tolerance.logs):
        value: Callable[[float], float] = math.log if tolerance.logs else float
        share = (value(beyond.value) - value(wanted)) / (value(beyond.value) - value(lax.value))
    return tolerance.setting(low + min(max(share, EDGE), 1 - EDGE) * (high - low))
