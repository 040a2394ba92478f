"""A fit that the base model judges: in the metric of its prompts that does best on the rows that choose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.divergence import diverge
from bslora_convert.behaviour.evidence import PLAIN_NAME, Evidence, metrics_of
from bslora_convert.behaviour.prompts import Example
from bslora_convert.behaviour.rows import RowSums, means
from bslora_convert.behaviour.workshop import Workshop
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.conversion.fitting import Stored, fit_stored
from bslora_convert.fit.source import Source
from bslora_convert.lora import LoraAdapter
from bslora_convert.process.progress import Progress
from bslora_convert.recipe.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Judged:
    """A fit, the source in the metric that was kept, the KL of each metric on the rows that choose."""

    stored: Stored
    source: Source
    kl: Mapping[str, float]
    kept: str

    @property
    def metric(self) -> dict[str, Any]:
        """What a record says of the metric."""
        return {"kl": dict(self.kl), "kept": self.kept}

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of it."""
        if self.kept != PLAIN_NAME:
            return ()
        return ("no metric of the prompts did better on the rows that choose; the plain fit is kept",)


@dataclass(frozen=True, slots=True)
class Judge:
    """The base model with the original, the rows of the evidence, and what is to be fitted for them."""

    workshop: Workshop
    evidence: Evidence
    source: Source
    dtype: torch.dtype
    adapter: LoraAdapter
    progress: Progress

    def rows(self, form: BsloraForm, examples: Sequence[Example]) -> list[RowSums]:
        """How a form predicts on each of some rows, against the original adapter."""
        workshop = self.workshop
        attached = Attached(workshop.base.model, form, workshop.adapter.carried, "the result", enabled=False)
        try:
            return diverge(
                workshop.base, workshop.known, workshop.bare, attached, examples, self.evidence.batch_size,
                lambda done: self.progress("measuring behaviour", done, len(examples)),
            ).rows  # fmt: skip
        finally:
            attached.remove()

    def fit(self, recipe: Recipe) -> Judged:
        """The fit in the metric that does best on the rows that choose.

        Raises what `fit_stored` raises.
        """
        best: tuple[Stored, Source] | None = None
        kept, kl = PLAIN_NAME, {}
        metrics = metrics_of(self.workshop, self.source.deltas, self.evidence, recipe.evidence.metric)
        for name, metric in metrics.items():
            source = self.source.measured_in(metric)
            stored = fit_stored(source, recipe, self.dtype, self.adapter, self.progress)
            kl[name] = float(means(self.rows(stored.form, self.evidence.choose)).kl)
            if best is None or kl[name] < kl[kept]:
                best, kept = (stored, source), name
        assert best is not None  # there is the plain metric
        return Judged(*best, kl, kept)
