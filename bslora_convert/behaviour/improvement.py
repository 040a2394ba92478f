"""What the base model can do for a fitted form: calibration, then distillation, on one base in memory.

Both are optional and neither can make the result worse on the rows that they hold out.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.calibrate import collect
from bslora_convert.behaviour.distill import Distilled, distill, split_heldout
from bslora_convert.behaviour.divergence import heldout_kl
from bslora_convert.behaviour.prompts import Example, Prompts
from bslora_convert.behaviour.workshop import Rows, Workshop
from bslora_convert.behaviour.writing import Writing, deadline_of, order_of_need
from bslora_convert.bslora.coding.file import coded_tensors, to_file
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.layout import Layout
from bslora_convert.coding.form import Aim, local_bits, recode_locals
from bslora_convert.fit.calibrated import refit_locals, residual_terms
from bslora_convert.fit.lowrank import Delta
from bslora_convert.metric.metric import Moments
from bslora_convert.modules.factors import add
from bslora_convert.process.progress import Progress
from bslora_convert.recipe.training import Training


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A form, its codes where it has any, what was measured, and notes."""

    form: BsloraForm
    codes: Mapping[str, Tensor]
    record: Mapping[str, Any]
    notes: tuple[str, ...]


def calibrated(
    workshop: Workshop,
    form: BsloraForm,
    deltas: Mapping[str, Delta],
    prompts: Prompts,
    *,
    metric: str = "input",
    uniform: bool = False,
    seed: int = 0,
    codes: Mapping[str, Tensor] | None = None,
    bits: int | None = None,
    writing: Writing | None = None,
) -> Calibrated:
    """The form with its local parts refitted in the prompts' metric, or as it was where that is no better held out.

    codes: what the form was decoded from, if it was; as many bits are spent anew. bits: the one width of all codes, where
    they have one. writing: how missing completions are written.
    """
    rows, fitted, held = _split(workshop, prompts, Training(heldout=0.1, seed=seed), writing or Writing())
    notes = list(rows.notes)
    terms = residual_terms(deltas, form)
    factors = {name: add(*parts) for name, parts in terms.items()}
    moments = collect(
        workshop.base, workshop.reference, factors, fitted, prompts.batch_size, metric,
        lambda done: workshop.progress("calibrating", done, len(fitted)),
    )  # fmt: skip
    if codes:
        refitted, recoded = _recoded(form, codes, deltas, moments, uniform, bits, workshop.progress)
    else:
        refitted, recoded = refit_locals(form, terms, moments, uniform), {}
    workshop.progress("measuring both fits", 0, 0)
    kl = {}
    for name, candidate in (("data_free", form), ("calibrated", refitted)):
        attached = Attached(workshop.base.model, candidate, workshop.adapter.carried, name, enabled=False)
        kl[name] = heldout_kl(workshop.base, workshop.reference, attached, held, prompts.batch_size)
        attached.remove()
    kept = min(kl, key=lambda name: kl[name])
    record = {
        "metric": metric,
        "rows": len(fitted),
        "tokens": sum(len(example.ids) for example in fitted),
        "heldout_rows": len(held),
        "heldout_kl": kl,
        "kept": kept,
    }
    if kept == "data_free":
        notes.append("the calibrated fit was no better on the held-out rows; the data-free one is kept")
        return Calibrated(form, codes or {}, record, tuple(notes))
    return Calibrated(refitted, recoded, record, tuple(notes))


def _recoded(
    form: BsloraForm,
    codes: Mapping[str, Tensor],
    deltas: Mapping[str, Delta],
    moments: Mapping[str, Moments],
    uniform: bool,
    bits: int | None,
    progress: Progress,
) -> tuple[BsloraForm, dict[str, Tensor]]:
    """The form and its codes, local parts coded anew in the metric in as many bits."""

    def said(_: str, done: int, total: int) -> None:
        progress("coding in the metric", done, total)

    tensors = coded_tensors(codes, Layout.of(form).tensors())
    ranks = {name: module.local.rank for name, module in form.modules.items()} if uniform else None
    aim = Aim(bits=local_bits(form, tensors), width=bits, ranks=ranks)
    found = recode_locals(deltas, form, tensors, moments, aim, next(form.tensors()).dtype, said)
    return found.form, to_file(found.tensors)


def distilled(
    workshop: Workshop,
    form: BsloraForm,
    prompts: Prompts,
    training: Training,
    *,
    codes: Mapping[str, Tensor] | None = None,
    heldout: Prompts | None = None,
    completions: Path | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    began: float | None = None,
) -> Distilled:
    """The form trained against the reference.

    codes: what it was decoded from, if it was. heldout: rows that choose the state kept, instead of a share of `prompts`.
    completions: a directory that keeps what the reference writes. checkpoints: one that takes the state after every evaluation;
    resume: go on from there where there is one.
    began: `time.perf_counter()` at the beginning of the whole command, from which `max_minutes` counts.
    """
    began = began or time.perf_counter()
    going_on = resume and checkpoints is not None and checkpoints.is_dir()
    writing = Writing(completions, deadline_of(began, training.max_minutes), closed=going_on)
    if heldout is None:
        rows, examples, held = _split(workshop, prompts, training, writing)
        notes = rows.notes
    else:
        # The rows that choose come first, in half of the time.
        early = deadline_of(began, training.max_minutes and training.max_minutes / 2)
        other = workshop.encode(heldout, replace(writing, deadline=early))
        rows = workshop.encode(prompts, replace(writing, order=order_of_need(prompts.rows, (), training.seed)))
        examples, held, notes = list(rows.examples), list(other.examples), (*rows.notes, *other.notes)
    done = distill(
        workshop.base, workshop.reference, form, examples, held, training,
        codes=codes, checkpoints=checkpoints, resume=resume, began=began, progress=workshop.progress,
    )  # fmt: skip
    written = {"written": rows.written, "left_out": rows.left_out} if rows.written or rows.left_out else None
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
