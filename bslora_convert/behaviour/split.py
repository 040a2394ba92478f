"""The rows of `--prompts` in three parts, drawn with the seed: calibration, validation and test rows.

calibration   give the metric of a fit (`calibrate`), and where asked train the distillation
validation    choose among metrics, sizes and states of a training
test          give the figures that are reported; they are held out of everything before
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from bslora_convert.behaviour.intervals import two_sided
from bslora_convert.behaviour.prompts import Example, Prompts, Row
from bslora_convert.behaviour.rows import RowSums, means, measures, resampled_means
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.writing import Writing, order_of_need
from bslora_convert.errors import InputError
from bslora_convert.results.adapter import ProofRecord

VALIDATION = TEST = 0.2  # shares of the rows
LEAST_ROWS = 3


@dataclass(frozen=True, slots=True)
class RowSplit:
    """Rows as tokens, by what they are for, and how many are run at once; notes on how they were read."""

    calibration: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]
    batch_size: int
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many rows there are of each part."""
        return {part: len(getattr(self, part)) for part in ("calibration", "validation", "test")}


def proof_of(rows: Sequence[RowSums], seed: int) -> ProofRecord:
    """What was measured on the test rows, with 95 % intervals over rows."""
    drawn = resampled_means(rows, seed)
    kl, retention, agreement = (list(two_sided(values)) for values in (drawn.kl, drawn.retention, drawn.agreement))
    found = measures(means(rows))
    return ProofRecord(
        rows=len(rows), kl=found["kl"], base_kl=found["base_kl"], retention=found["retention"],
        agreement=found["agreement"], kl_ci95=kl, retention_ci95=retention, agreement_ci95=agreement,
    )  # fmt: skip


def split_rows(session: BaseModelSession, prompts: Prompts, seed: int, writing: Writing) -> RowSplit:
    """The rows of a file in their three parts; missing completions are written where there is time.

    :raises InputError: when they are too few.
    """
    if len(prompts.rows) < LEAST_ROWS:
        raise InputError(
            f"{prompts.path}: {len(prompts.rows)} rows can't be split into calibration, validation and test rows; give more"
        )
    parts = split(prompts.rows, seed)
    order = order_of_need(parts[0], (*parts[1], *parts[2]), seed)
    rows = session.encode(prompts, replace(writing, order=order))
    where = {row.line: place for place, part in enumerate(parts) for row in part}
    first, second, third = (tuple(e for e in rows.examples if where[e.row.line] == place) for place in range(3))
    if not (first and second and third):
        raise InputError(
            f"{prompts.path}: too few completions were written in time for calibration, validation and test rows"
        )
    return RowSplit(first, second, third, prompts.batch_size, rows.notes)


def split(rows: Sequence[Row], seed: int) -> tuple[list[Row], list[Row], list[Row]]:
    """(calibration, validation, test), each in the order of the file; the same for the same rows and seed."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    choosing, proving = (max(1, round(share * len(rows))) for share in (VALIDATION, TEST))
    cuts = order[:choosing], order[choosing : choosing + proving], order[choosing + proving :]
    validation, test, calibration = ([rows[at] for at in sorted(part)] for part in cuts)
    return calibration, validation, test
