"""From a behaviour that is asked for to the smallest conversion that has it, proved on the test rows.

Every measure is turned into what is missed, which a larger file makes less of: 1 − retention, KL, 1 − agreement, each at its 95 %
bound over the validation rows. What is missed goes with the energy that a size loses, as KL is quadratic in a small change of the
weights:  missed ≈ c · lost(share)^p,  p = 1, and 1/2 for agreement, which goes with the root of the KL.

search over sizes (`conversion.solve`), each converted and measured on the validation rows
  -> [a smaller one distilled] -> test rows -> on a miss: the one before the distillation, then one step stricter -> test rows

Sizes that are far off are converted in the plain metric; the first one that is near decides on metric and transform.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from bslora_convert.behaviour.distill import Distilled
from bslora_convert.behaviour.evaluator import Evaluated, Evaluator
from bslora_convert.behaviour.intervals import RULE_OF_THREE, at_least, at_most, few_words, too_few
from bslora_convert.behaviour.rows import RowSums, means, measures, resampled_means
from bslora_convert.bslora.storage import coded_bytes
from bslora_convert.coding.forecast import Forecast
from bslora_convert.conversion.convert import convert
from bslora_convert.conversion.request import Converted, Request
from bslora_convert.conversion.solve import BEHAVIOUR, Trial, solve_size
from bslora_convert.errors import RecipeError, ThresholdMissed
from bslora_convert.recipe.measures import AGREEMENT, KL, RETENTION, Measure
from bslora_convert.results.adapter import AimRecord, ProofRecord, StepRecord

GAIN = 3.0  # times less that is missed once distilled, as a rule
LOOKS = 3  # results that are proved at most
FAR = 3.0  # times more missed than may be: such a conversion tells little of which metric is best at the size that is sought
STRICTER = 0.9  # of what may be missed, beside what the proof tells, once a proof has failed
LARGEST, SMALLEST = 1.0, 1 / 1024  # shares of the source's bytes
STEP = 16.0  # most by which a size changes from one trial to the next
FINE = 1.001  # ratio of two sizes that are the same
POWER = {RETENTION: 1.0, KL: 1.0, AGREEMENT: 0.5}  # p
USUAL = 0.03  # missed retention against lost energy, of adapters that were looked at
USUAL_KL = 0.5  # of the bare base
MOST_LOST = 0.9  # share of the energy that a first guess may lose

Outcome = Converted | Distilled
Distil = Callable[[Converted], Distilled]


@dataclass(frozen=True, slots=True)
class Reached:
    """The smallest result of a behaviour. chosen: how it was converted; made: what is to be written. record: how it was found."""

    chosen: Evaluated
    made: Outcome
    record: AimRecord
    notes: tuple[str, ...] = ()


def convert_to_behaviour(evaluator: Evaluator, request: Request, distil: Distil | None = None) -> Reached:
    """The smallest conversion that reaches a behaviour on the validation rows with 95 % certainty, and on the test rows.

    distil: trains a conversion; then a smaller one is tried, trained.

    :raises ThresholdMissed: when none does, saying what was reached and what would help.
    :raises RecipeError: when nothing can be made of the adapter.
    """
    walk = _Walk(evaluator, request)
    proofs: list[ProofRecord] = []
    for made in islice(walk.candidates(distil), LOOKS):
        found = evaluator.proof(made.form)
        proof = replace(found, met=walk.measure.is_met(found[walk.measure.name], walk.limit))
        proofs.append(proof)
        if proof.met:
            assert walk.chosen is not None  # something was made
            record = AimRecord(asked={walk.measure.option: walk.limit}, path=walk.path_to(made), proofs=proofs)
            count = len(evaluator.split.validation)
            few = (few_words(walk.asked, count, "validation rows"),) if too_few(count) else ()
            return Reached(walk.chosen, made, record, few)
        walk.tighten(walk.measure.missed(proof[walk.measure.name]))
    raise ThresholdMissed(_unproved(walk, proofs[-1], distil is not None))


def bound_of(rows: Sequence[RowSums], measure: Measure, seed: int) -> float:
    """What a measure is at least, or a KL at most, of all rows, with 95 % certainty: by bootstrap over rows.

    Where every token agreed there is nothing to resample: then up to 3 / n of all tokens may differ.
    """
    drawn = resampled_means(rows, seed)
    values = getattr(drawn, measure.name)
    bound = at_least(values) if measure.more_is_better else at_most(values)
    return min(bound, 1 - RULE_OF_THREE / sum(row.tokens for row in rows)) if measure is AGREEMENT else bound


def first_lost(measure: Measure, allowed: float) -> float:
    """A guess at the share of the energy that may be lost. allowed: what may be missed."""
    retention = {RETENTION: allowed, KL: allowed / USUAL_KL, AGREEMENT: allowed**2}[measure]
    return min(retention / USUAL, MOST_LOST)


def predicted(known: Trial[Any], wanted: float, lost: Callable[[float], float], power: float) -> float:
    """The share of the bytes at which c · lost^p is what is wanted, c by one trial, at most STEP times away from it."""
    aimed = lost(known.setting) * (wanted / max(known.value, 1e-9)) ** (1 / power)
    low, high = max(known.setting / STEP, SMALLEST), min(known.setting * STEP, LARGEST)
    while high / low > FINE:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if lost(middle) > aimed else (low, middle)
    return high


@dataclass(slots=True)
class _Walk:
    """One search: what is asked for, every step so far, and the conversion that decided on metric and transform."""

    evaluator: Evaluator
    request: Request
    steps: list[tuple[Outcome, StepRecord]] = field(default_factory=list)
    chosen: Evaluated | None = None
    refused: RecipeError | None = None
    tightened: float = 1.0

    @property
    def measure(self) -> Measure:
        """What is limited."""
        assert self.request.target.measure is not None  # who calls sees to it
        return self.request.target.measure

    @property
    def limit(self) -> float:
        """The limit on it."""
        return self.request.target.limit

    @property
    def size(self) -> int:
        """Bytes of the source's file."""
        return self.request.source_bytes

    @property
    def asked(self) -> str:
        """As the command line says it."""
        return f"{self.measure.flag} {self.limit:g}"

    @property
    def allowed(self) -> float:
        """What may be missed on the validation rows."""
        return self.tightened * self.measure.missed(self.limit)

    def path_to(self, made: Outcome) -> list[StepRecord]:
        """Every step, with the one that was kept marked."""
        return [replace(step, kept=one is made) for one, step in self.steps]

    def tighten(self, missed: float) -> None:
        """A proof missed so much: from now on less may be missed."""
        self.tightened *= STRICTER * min(1.0, self.measure.missed(self.limit) / missed)

    def candidates(self, distil: Distil | None) -> Iterator[Outcome]:
        """Results to prove, the smallest first.

        :raises ThresholdMissed: when there is none.
        """
        source, power = self.evaluator.source, POWER[self.measure]
        expected = Forecast.of(source.spectra, source.shapes)

        def lost(share: float) -> float:
            return expected.lost_for(int(8 * share * self.size)) / source.energy if source.energy else 0.0

        def follow(known: Sequence[Trial[Any]], wanted: float) -> float:
            return predicted(known[-1], wanted, lost, power)

        asked = distil is not None
        first = expected.bits_for(first_lost(self.measure, self.allowed) * source.energy) / 8 / self.size
        while True:
            found = solve_size(self.trial, self.allowed, first, follow, BEHAVIOUR, (SMALLEST, LARGEST))
            if not found.trials:
                raise self.refused or RecipeError(
                    f"{self.measure.option}: nothing can be made of this adapter", self.measure.option
                )
            known = found.best or found.trials[-1]
            if distil is not None:
                smaller = min(follow([known], BEHAVIOUR.aimed * GAIN * self.allowed), known.setting)
                trained = self.distilled(smaller, distil)
                if trained is not None:
                    yield trained
                    distil = None
            if found.best is None:
                raise ThresholdMissed(_unreached(self, asked))
            yield found.best.made
            first = follow([found.best], BEHAVIOUR.aimed * self.allowed)

    def trial(self, share: float) -> Trial[Converted] | None:
        """A conversion of so many of the source's bytes, measured; None where they hold none."""
        try:
            converted, rows = self.converted(share)
        except RecipeError as error:
            if "bytes" not in error.fields:
                raise
            self.refused = error
            return None
        return Trial(share, self.measured(converted, rows), share, converted)

    def converted(self, share: float, decide: bool = False) -> tuple[Converted, Sequence[RowSums]]:
        """A conversion of so many of the source's bytes, and how it predicts on the validation rows.

        The first one that is not far off decides on metric and transform. decide: whether this one does in any case.
        """
        request = self.request.of_bytes(math.floor(share * self.size))
        if self.chosen is not None:
            made = convert(self.chosen.source, request, self.evaluator.session.progress)
            return made, self.evaluator.rows(made.form, self.evaluator.split.validation)
        found = self.evaluator.plain(request)
        if decide or self.missed(found.rows) <= FAR * self.allowed:
            found = self.chosen = self.evaluator.best(request, found)
            name = found.converted.form.transform_name
            kept = (one for one in self.request.structure.each() if one.transform == name)
            self.request = replace(self.request, structure=next(kept, self.request.structure))
        return found.converted, found.rows

    def missed(self, rows: Sequence[RowSums]) -> float:
        """What rows miss at their bound."""
        return self.measure.missed(bound_of(rows, self.measure, self.evaluator.seed))

    def measured(self, made: Outcome, rows: Sequence[RowSums]) -> float:
        """What a result misses at its bound on the validation rows, taken down as a step."""
        bound = bound_of(rows, self.measure, self.evaluator.seed)
        missed = self.measure.missed(bound)
        taken = coded_bytes(made.codes, self.request.carried)
        step = StepRecord(
            bytes=taken, byte_ratio=taken / self.size, transform=made.form.transform_name,
            distilled=isinstance(made, Distilled), **measures(means(rows)), bound=bound, met=missed <= self.allowed, kept=False,
        )  # fmt: skip
        self.steps.append((made, step))
        return missed

    def distilled(self, share: float, distil: Distil) -> Distilled | None:
        """A smaller one, distilled, if that reaches the limit."""
        try:
            found = distil(self.converted(share, decide=True)[0])
        except RecipeError as error:
            if "bytes" not in error.fields:
                raise
            return None
        rows = self.evaluator.rows(found.form, self.evaluator.split.validation)
        return found if self.measured(found, rows) <= self.allowed else None


def _unreached(walk: _Walk, trained: bool) -> str:
    """Why no size reaches it."""
    last = max((step for _, step in walk.steps), key=lambda step: (step.byte_ratio, step.distilled))
    name, count = walk.measure.name, len(walk.evaluator.split.validation)
    said = (
        f"{walk.asked} is not reached on the {count} validation rows: {last.byte_ratio:.1%} of the bytes have a {name} of "
        f"{last[name]:.5g}, with 95 % certainty {walk.measure.bound} {last.bound:.5g} of all rows"
    )
    if walk.measure.is_met(last[name], walk.limit):
        return f"{said}; more rows of --prompts would bring the two together"
    return f"{said}; ask for less{'' if trained else ', or add --finetune'}, or raise --max-rank"


def _unproved(walk: _Walk, proof: ProofRecord, trained: bool) -> str:
    """Why none is proved."""
    name = walk.measure.name
    low, high = proof[f"{name}_ci95"]
    return (
        f"{walk.asked} holds on the validation rows and not on the {proof.rows} test rows: {name} {proof[name]:.5g} "
        f"({low:.5g} to {high:.5g} with 95 % certainty); give more rows of --prompts, ask for less"
        f"{'' if trained else ', or add --finetune'}"
    )
