"""From a behaviour that is asked for to the smallest fit that has it, proved on rows that nothing before has seen.

walk over sizes (`smallest`), each fitted, coded and measured on the rows that choose
  -> [a smaller one distilled] -> prove -> on a miss: the one before the distillation, then one step stricter -> prove
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from bslora_convert.behaviour.distill import Distilled
from bslora_convert.behaviour.intervals import few_words, too_few
from bslora_convert.behaviour.judge import Judge, Judged
from bslora_convert.behaviour.rows import means, measures
from bslora_convert.behaviour.smallest import POWER, Attempt, bound_of, first_lost, missed_of, predicted, smallest
from bslora_convert.bslora.storage import coded_bytes
from bslora_convert.coding.forecast import Forecast
from bslora_convert.conversion.fitting import Stored, by_name, fit_stored
from bslora_convert.errors import RecipeError, ThresholdMissed
from bslora_convert.recipe.aim import BEHAVIOURS
from bslora_convert.recipe.recipe import Recipe

MEASURE = {"min_retention": "retention", "max_kl": "kl", "min_agreement": "agreement"}
GAIN = 3.0  # times less that is missed once distilled, as a rule
LOOKS = 3  # results that are proved at most
FAR = 3.0  # times more missed than may be: such a fit tells little of which metric is best at the size that is sought
STRICTER = 0.9  # of what may be missed, beside what the proof tells, once a proof has failed

Made = Stored | Distilled
Distil = Callable[[Stored], Distilled]


@dataclass(frozen=True, slots=True)
class Reached:
    """The smallest result of a behaviour. fit: how it was fitted; made: what is to be written. record: how it was found."""

    fit: Judged
    made: Made
    record: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def fit_to_behaviour(judge: Judge, recipe: Recipe, distil: Distil | None = None) -> Reached:
    """The smallest fit that reaches a behaviour on the rows that choose with 95 % certainty, and on those that prove.

    distil: trains a fit; then a smaller one is tried, trained.

    :raises ThresholdMissed: when none does, saying what was reached and what would help.
    :raises RecipeError: when nothing can be made of the adapter.
    """
    walk = _Walk(judge, recipe, recipe)
    proofs: list[dict[str, Any]] = []
    for made in islice(walk.candidates(distil), LOOKS):
        proof = walk.proved(made)
        proofs.append(proof)
        if proof["met"]:
            assert walk.fit is not None  # something was made
            walk.steps[id(made)]["kept"] = True
            found = {"asked": {walk.aim: walk.limit}, "path": walk.path, "proofs": proofs}
            count = len(judge.evidence.choose)
            few = (few_words(_option(walk), count, "rows that choose"),) if too_few(count) else ()
            return Reached(walk.fit, made, found, few)
        walk.tighten(missed_of(walk.aim, proof[MEASURE[walk.aim]]))
    raise ThresholdMissed(_unproved(walk, proofs[-1], distil is not None))


@dataclass(slots=True)
class _Walk:
    """One search: what is asked for, what may be missed, every step so far; the fit whose metric and transform were kept.

    asked: the recipe, recipe: that with the transform that was kept.
    """

    judge: Judge
    asked: Recipe
    recipe: Recipe
    path: list[dict[str, Any]] = field(default_factory=list)
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)  # of the path, by what was measured
    fit: Judged | None = None
    refused: RecipeError | None = None
    tightened: float = 1.0

    @property
    def aim(self) -> str:
        """The option."""
        assert self.recipe.aim.behaviour is not None  # who calls sees to it
        return self.recipe.aim.behaviour[0]

    @property
    def limit(self) -> float:
        """Its value."""
        assert self.recipe.aim.behaviour is not None
        return self.recipe.aim.behaviour[1]

    @property
    def allowed(self) -> float:
        """What may be missed on the rows that choose."""
        return self.tightened * missed_of(self.aim, self.limit)

    @property
    def size(self) -> int:
        """Bytes of the source's file."""
        return self.judge.adapter.weights.stat().st_size

    def tighten(self, missed: float) -> None:
        """A proof missed so much: from now on less may be missed."""
        self.tightened *= STRICTER * min(1.0, missed_of(self.aim, self.limit) / missed)

    def candidates(self, distil: Distil | None) -> Iterator[Made]:
        """Results to prove, the smallest first.

        :raises ThresholdMissed: when there is none.
        """
        expected, source = Forecast.of(self.judge.source.plain.spectra, self.judge.source.shapes), self.judge.source
        power, size = POWER[self.aim], self.size

        def lost(share: float) -> float:
            return expected.lost_for(int(8 * share * size)) / source.energy if source.energy else 0.0

        asked = distil is not None
        first = expected.bits_for(first_lost(self.aim, self.allowed) * source.energy) / 8 / size
        while True:
            best, tried = smallest(self.make, first, lost, power)
            if not tried:
                raise self.refused or RecipeError(f"{self.aim}: nothing can be made of this adapter", self.aim)
            if distil is not None:
                trained = self.distilled(best or tried[-1], lost, distil)
                if trained is not None:
                    yield trained
                    distil = None
            if best is None:
                raise ThresholdMissed(_unreached(self, asked))
            yield best.made
            first = predicted(replace(best, allowed=self.allowed), lost, power)

    def make(self, share: float) -> Attempt[Stored] | None:
        """A fit of so many of the source's bytes, measured; None where they hold none."""
        stored = self.fitted(share)
        if stored is None:
            return None
        missed, allowed = self.measured(stored)
        if missed > FAR * allowed and not any(step["met"] for step in self.path):
            self.fit, self.recipe = None, self.asked
        return Attempt(stored, share, missed, allowed)

    def fitted(self, share: float) -> Stored | None:
        """A fit of so many of the source's bytes; the first one that is not far off decides on metric and transform."""
        sized = {"bytes": share, **dict.fromkeys(BEHAVIOURS)}
        try:
            if self.fit is None:
                self.fit = self.judge.fit(self.recipe.but(**sized))
                name = self.fit.stored.form.transform_name
                self.recipe = next((one for one in by_name(self.asked) if one.form.transform == name), self.asked)
                return self.fit.stored
            judge = self.judge
            return fit_stored(self.fit.source, self.recipe.but(**sized), judge.dtype, judge.adapter, judge.progress)
        except RecipeError as error:
            if "bytes" not in error.fields:
                raise
            self.refused = error
            return None

    def measured(self, made: Made) -> tuple[float, float]:
        """What it misses at its bound on the rows that choose, and what it may; a step of the path."""
        rows = self.judge.rows(made.form, self.judge.evidence.choose)
        bound = bound_of(rows, self.aim, self.recipe.seed)
        missed = missed_of(self.aim, bound)
        taken = coded_bytes(made.codes, self.judge.adapter.carried)
        step = {
            "bytes": taken,
            "byte_ratio": taken / self.size,
            "transform": made.form.transform_name,
            "distilled": isinstance(made, Distilled),
            **measures(means(rows)),
            "bound": bound,
            "met": missed <= self.allowed,
            "kept": False,
        }
        self.path.append(step)
        self.steps[id(made)] = step
        return missed, self.allowed

    def distilled(self, from_: Attempt[Stored], lost: Callable[[float], float], distil: Distil) -> Distilled | None:
        """A smaller one, distilled, if that reaches the limit."""
        share = predicted(replace(from_, allowed=GAIN * self.allowed), lost, POWER[self.aim])
        stored = self.fitted(min(share, from_.share))
        if stored is None:
            return None
        found = distil(stored)
        missed, allowed = self.measured(found)
        return found if missed <= allowed else None

    def proved(self, made: Made) -> dict[str, Any]:
        """What it does on the rows that prove."""
        evidence = self.judge.evidence
        found = evidence.proof(self.judge.rows(made.form, evidence.prove), self.recipe.seed)
        return {**found, "met": missed_of(self.aim, found[MEASURE[self.aim]]) <= missed_of(self.aim, self.limit)}


def _option(walk: _Walk) -> str:
    return f"--{walk.aim.replace('_', '-')} {walk.limit:g}"


def _unreached(walk: _Walk, trained: bool) -> str:
    """Why no size reaches it."""
    last = max(walk.path, key=lambda step: (step["byte_ratio"], step["distilled"]))
    name, count = MEASURE[walk.aim], len(walk.judge.evidence.choose)
    bound = "at most" if walk.aim == "max_kl" else "at least"
    said = (
        f"{_option(walk)} is not reached on the {count} rows that choose: {last['byte_ratio']:.1%} of the bytes have a {name} of "
        f"{last[name]:.5g}, with 95 % certainty {bound} {last['bound']:.5g} of all rows"
    )
    if missed_of(walk.aim, last[name]) <= missed_of(walk.aim, walk.limit):
        return f"{said}; more rows of --prompts would bring the two together"
    return f"{said}; ask for less{'' if trained else ', or add --finetune'}, or raise --max-rank"


def _unproved(walk: _Walk, proof: Mapping[str, Any], trained: bool) -> str:
    """Why none is proved."""
    name, (low, high) = MEASURE[walk.aim], proof[f"{MEASURE[walk.aim]}_ci95"]
    return (
        f"{_option(walk)} holds on the rows that choose and not on the {proof['rows']} that prove: {name} {proof[name]:.5g} "
        f"({low:.5g} to {high:.5g} with 95 % certainty); give more rows of --prompts, ask for less"
        f"{'' if trained else ', or add --finetune'}"
    )
