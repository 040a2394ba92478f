"""A fitted form distilled against the original on one base in memory: never worse on the rows that choose than it began."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bslora_convert.behaviour.distill import Distilled, distill, split_heldout
from bslora_convert.behaviour.evidence import Evidence
from bslora_convert.behaviour.prompts import Example, Prompts
from bslora_convert.behaviour.workshop import Rows, Workshop
from bslora_convert.behaviour.writing import Writing, deadline_of, order_of_need
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.recipe.training import Training


def distilled(
    workshop: Workshop,
    form: BsloraForm,
    prompts: Prompts | None,
    training: Training,
    *,
    codes: Mapping[str, Tensor] | None = None,
    heldout: Prompts | None = None,
    evidence: Evidence | None = None,
    completions: Path | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    began: float | None = None,
) -> Distilled:
    """The form trained against the reference.

    codes: what it was decoded from, if it was. heldout: rows that choose the state kept, instead of a share of `prompts`.
    evidence: rows that were split before, to train and to choose on, instead of both.
    completions: a directory that keeps what the reference writes. checkpoints: one that takes the state after every evaluation;
    resume: go on from there where there is one.
    began: `time.perf_counter()` at the beginning of the whole command, from which `max_minutes` counts.
    """
    began = began or time.perf_counter()
    going_on = resume and checkpoints is not None and checkpoints.is_dir()
    writing = Writing(completions, deadline_of(began, training.max_minutes), closed=going_on)
    rows: Rows | None = None
    notes: tuple[str, ...] = ()
    if evidence is not None:
        examples, held = list(evidence.fit), list(evidence.choose)
    elif heldout is None:
        assert prompts is not None  # rows come from somewhere
        rows, examples, held = _split(workshop, prompts, training, writing)
        notes = rows.notes
    else:
        assert prompts is not None
        # The rows that choose come first, in half of the time.
        early = deadline_of(began, training.max_minutes and training.max_minutes / 2)
        other = workshop.encode(heldout, replace(writing, deadline=early))
        rows = workshop.encode(prompts, replace(writing, order=order_of_need(prompts.rows, (), training.seed)))
        examples, held, notes = list(rows.examples), list(other.examples), (*rows.notes, *other.notes)
    done = distill(
        workshop.base, workshop.reference, form, examples, held, training,
        codes=codes, checkpoints=checkpoints, resume=resume, began=began, progress=workshop.progress,
    )  # fmt: skip
    written = {"written": rows.written, "left_out": rows.left_out} if rows and (rows.written or rows.left_out) else None
    record = {**done.record, **({"completions": written} if written else {})}
    return Distilled(done.form, done.log, record, (*notes, *done.notes), done.codes)


def _split(
    workshop: Workshop, prompts: Prompts, training: Training, writing: Writing
) -> tuple[Rows, list[Example], list[Example]]:
    """(all rows, examples for training, examples held out), missing completions written in the order that these are needed.

    The split is one of the file's rows: which of them there was time for does not move it.
    """
    train, held = split_heldout(prompts.rows, training)
    rows = workshop.encode(prompts, replace(writing, order=order_of_need(train, held, training.seed)))
    lines = {row.line for row in held}
    by_side: tuple[list[Example], list[Example]] = ([], [])
    for example in rows.examples:
        by_side[example.row.line in lines].append(example)
    return rows, *by_side
