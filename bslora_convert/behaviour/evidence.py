"""What the rows of `--prompts` are for: some give the metric of a fit, some choose among fits, and some prove what was chosen.

fit      the metric (`metrics_of`), and where asked the distillation
choose   which metric, which size, which state of a training
prove    the figures that are reported; nothing before has seen them
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bslora_convert.behaviour.calibrate import collect
from bslora_convert.behaviour.intervals import two_sided
from bslora_convert.behaviour.prompts import Example, Prompts, Row
from bslora_convert.behaviour.rows import RowSums, means, measures, resampled_means
from bslora_convert.behaviour.workshop import Workshop
from bslora_convert.behaviour.writing import Writing, order_of_need
from bslora_convert.errors import InputError
from bslora_convert.metric.metric import Metric, metric_of, output_metric
from bslora_convert.modules.lowrank import Delta

CHOOSING = PROVING = 0.2  # shares of the rows
PLAIN_NAME = "plain"
LEAST_ROWS = 3


@dataclass(frozen=True, slots=True)
class Evidence:
    """Rows as tokens, by what they are for, and how many are run at once; notes on how they were read."""

    fit: tuple[Example, ...]
    choose: tuple[Example, ...]
    prove: tuple[Example, ...]
    batch_size: int
    notes: tuple[str, ...] = ()

    @property
    def rows(self) -> dict[str, int]:
        """How many rows there are of each part."""
        return {part: len(getattr(self, part)) for part in ("fit", "choose", "prove")}

    def proof(self, rows: Sequence[RowSums], seed: int) -> dict[str, Any]:
        """What was measured on the rows that prove, with 95 % intervals over rows."""
        drawn = resampled_means(rows, seed)
        intervals = {f"{name}_ci95": list(two_sided(getattr(drawn, name))) for name in ("kl", "retention", "agreement")}
        return {"rows": len(rows), **measures(means(rows)), **intervals}


def gather(workshop: Workshop, prompts: Prompts, seed: int, writing: Writing) -> Evidence:
    """The rows of a file, drawn with the seed into their three parts; missing completions are written where there is time.

    :raises InputError: when they are too few.
    """
    if len(prompts.rows) < LEAST_ROWS:
        raise InputError(
            f"{prompts.path}: {len(prompts.rows)} rows can't be split into some to fit, to choose and to prove; give more"
        )
    parts = split(prompts.rows, seed)
    order = order_of_need(parts[0], (*parts[1], *parts[2]), seed)
    rows = workshop.encode(prompts, replace(writing, order=order))
    where = {row.line: place for place, part in enumerate(parts) for row in part}
    fit, choose, prove = (tuple(e for e in rows.examples if where[e.row.line] == place) for place in range(3))
    if not (fit and choose and prove):
        raise InputError(f"{prompts.path}: too few completions were written in time to fit, to choose and to prove")
    return Evidence(fit, choose, prove, prompts.batch_size, rows.notes)


def split(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """(fit, choose, prove), each in the order of the file; the same for the same rows and seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    choosing, proving = (max(1, round(share * len(rows))) for share in (CHOOSING, PROVING))
    cuts = order[:choosing], order[choosing : choosing + proving], order[choosing + proving :]
    choose, prove, fit = ([rows[at] for at in sorted(part)] for part in cuts)
    return fit, choose, prove


def metrics_of(
    workshop: Workshop, deltas: Mapping[str, Delta], evidence: Evidence, metric: str
) -> dict[str, dict[str, Metric]]:
    """The metrics to choose from, by name and module: `plain` (nothing), and those that were asked for.

    metric: `output`, `input`, `two-sided` or `auto` for all.
    """
    factors = {name: delta.factors() for name, delta in deltas.items()}
    moments = collect(
        workshop.base, workshop.reference, factors, evidence.fit, evidence.batch_size,
        metric != "input",
        lambda done: workshop.progress("reading the metric", done, len(evidence.fit)),
    )  # fmt: skip
    found: dict[str, dict[str, Metric]] = {PLAIN_NAME: {}}
    if metric in ("output", "auto"):
        found["output"] = {name: output_metric(factors[name], one) for name, one in moments.items()}
    if metric in ("input", "auto"):
        one_sided = {name: replace(one, outputs=None) for name, one in moments.items()}
        found["input"] = {name: metric_of(factors[name], one) for name, one in one_sided.items()}
    if metric in ("two-sided", "auto"):
        found["two-sided"] = {name: metric_of(factors[name], one) for name, one in moments.items()}
    return found
