"""A source converted on its base model: in the metric of its prompts that does best on the validation rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bslora_convert.behaviour.calibrate import collect
from bslora_convert.behaviour.prompts import Example
from bslora_convert.behaviour.rows import RowSums, means
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.split import RowSplit, proof_of
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.conversion.convert import convert
from bslora_convert.conversion.request import Converted, Request
from bslora_convert.fit.source import Source
from bslora_convert.metric.metric import METRICS, PLAIN_NAME, Moments
from bslora_convert.results.adapter import MetricRecord, ProofRecord


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A conversion in the metric `kept`, with the source in it, its predictions on the validation rows, and every metric's KL."""

    converted: Converted
    source: Source
    rows: Sequence[RowSums]
    kl: Mapping[str, float]
    kept: str

    @property
    def metric(self) -> MetricRecord:
        """What a record says of the metric."""
        return MetricRecord(kl=dict(self.kl), kept=self.kept)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of it."""
        if self.kept != PLAIN_NAME:
            return ()
        return ("no metric of the prompts did better on the validation rows; the plain fit is kept",)


class Evaluator:
    """Converts one source and measures what comes of it on the base model."""

    def __init__(self, session: BaseModelSession, split: RowSplit, source: Source, metric: str, seed: int) -> None:
        """source: measured plainly. metric: the one to fit in, `auto` for the best one. seed: of intervals."""
        self.session, self.split, self.source, self.metric, self.seed = session, split, source, metric, seed

    def rows(self, form: BsloraForm, examples: Sequence[Example]) -> list[RowSums]:
        """How a form predicts on each of some rows, against the original adapter."""
        found = self.session.measure({"the result": form}, examples, self.split.batch_size, "measuring behaviour")
        return found["the result"].rows

    def proof(self, form: BsloraForm) -> ProofRecord:
        """What a form does on the test rows."""
        return proof_of(self.rows(form, self.split.test), self.seed)

    @cached_property
    def moments(self) -> Mapping[str, Moments]:
        """What the modules' factors see on the calibration rows, which are run once."""
        session, examples = self.session, self.split.calibration
        factors = {name: delta.factors() for name, delta in self.source.deltas.items()}
        return collect(
            session.base, session.reference, factors, examples, self.split.batch_size,
            self.metric != "input", lambda done: session.progress("reading the metric", done, len(examples)),
        )  # fmt: skip

    def sources(self) -> Iterator[tuple[str, Source]]:
        """The source in each metric that may be chosen, but for the plain one, by name: one at a time."""
        for name in METRICS if self.metric == "auto" else [self.metric]:
            metric = METRICS[name]
            deltas = self.source.deltas.items()
            yield name, self.source.measured_in({one: metric(d.factors(), self.moments[one]) for one, d in deltas})

    def plain(self, request: Request) -> Evaluated:
        """The conversion in the plain metric."""
        converted = convert(self.source, request, self.session.progress)
        rows = self.rows(converted.form, self.split.validation)
        return Evaluated(converted, self.source, rows, {PLAIN_NAME: float(means(rows).kl)}, PLAIN_NAME)

    def best(self, request: Request, plain: Evaluated | None = None) -> Evaluated:
        """The conversion in the metric of the lowest KL on the validation rows. plain: that in the plain one, where it is known.

        Raises what `convert` raises.
        """
        best = plain or self.plain(request)
        kl = dict(best.kl)
        for name, source in self.sources():
            converted = convert(source, request, self.session.progress)
            rows = self.rows(converted.form, self.split.validation)
            kl[name] = float(means(rows).kl)
            if kl[name] < kl[best.kept]:
                best = Evaluated(converted, source, rows, kl, name)
        return Evaluated(best.converted, best.source, best.rows, kl, best.kept)
