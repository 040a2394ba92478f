"""The rows that a distillation trains on, and those held out of it that choose the state that is kept."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bslora_convert.behaviour.checkpoints import directory_of
from bslora_convert.behaviour.prompts import Example, Prompts
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.split import RowSplit
from bslora_convert.behaviour.writing import Writing, deadline_of, order_of_need
from bslora_convert.errors import InputError
from bslora_convert.recipe.training import Training


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """How to train towards an output.

    out: beside it lies what is kept meanwhile. began: `time.perf_counter()` at the beginning of the whole command, from which
    `max_minutes` counts.
    """

    training: Training
    out: Path
    began: float

    @property
    def writing(self) -> Writing:
        """How the reference writes missing completions."""
        return Writing(directory_of(self.out), deadline_of(self.began, self.training.max_minutes))


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Rows as tokens. completions: how many the reference wrote, and how many it had no time for; None where it wrote none."""

    train: Sequence[Example]
    heldout: Sequence[Example]
    notes: tuple[str, ...] = ()
    completions: Mapping[str, int] | None = None

    @classmethod
    def of_split(cls, split: RowSplit) -> "TrainingRows":
        """Calibration rows train, validation rows choose."""
        return cls(split.calibration, split.validation)

    @classmethod
    def of_files(
        cls,
        session: BaseModelSession,
        prompts: Prompts,
        heldout: Prompts | None,
        run: TrainingRun,
        closed: bool = False,
    ) -> "TrainingRows":
        """The rows of a file, and those of another or a share of these held out; missing completions are written.

        closed: as of `Writing`.

        :raises InputError: when too few rows are left on either side.
        """
        notes: tuple[str, ...] = ()
        training, writing = run.training, replace(run.writing, closed=closed)
        if heldout is not None:  # its rows come first, in half of the time
            half = deadline_of(run.began, training.max_minutes and training.max_minutes / 2)
            other = session.encode(heldout, replace(writing, deadline=half))
            rows = session.encode(prompts, replace(writing, order=order_of_need(prompts.rows, (), training.seed)))
            train, held, notes = rows.examples, other.examples, other.notes
        else:
            train_rows, held_rows = split_heldout(prompts.rows, training)
            order = order_of_need(train_rows, held_rows, training.seed)
            rows = session.encode(prompts, replace(writing, order=order))
            # The split is one of the file's rows: which of them there was time for does not move it.
            lines = {row.line for row in held_rows}
            train, held = (tuple(e for e in rows.examples if (e.row.line in lines) == side) for side in (False, True))
        written = {"written": rows.written, "left_out": rows.left_out} if rows.written or rows.left_out else None
        return cls(train, held, (*rows.notes, *notes), written)


def split_heldout(examples: Sequence[Any], training: Training) -> tuple[list[Any], list[Any]]:
    """(for training, held out): a share of the rows drawn with the seed.

    :raises InputError: when too few rows are left on either side.
    """
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(training.seed)).tolist()
    count = min(training.max_heldout, max(1, round(training.heldout * len(examples)))) if training.heldout else 0
    if len(examples) - count < 1 or count < 1:
        raise InputError(
            f"{len(examples)} rows can't be split into some for training and some held out; give more rows"
        )
    held = sorted(order[:count])
    taken = set(held)
    return [example for i, example in enumerate(examples) if i not in taken], [examples[i] for i in held]
