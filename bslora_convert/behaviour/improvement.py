"""What the base model can do for a fitted form: calibration, then distillation, on one base in memory.

Both are optional and neither can make the result worse on the rows that they hold out.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.calibrate import collect
from bslora_convert.behaviour.distill import Distilled, distill, split_heldout
from bslora_convert.behaviour.divergence import heldout_kl
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.training import Training
from bslora_convert.behaviour.workshop import Workshop
from bslora_convert.bslora.coding.file import coded_tensors, to_file
from bslora_convert.bslora.factors import add
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.layout import Layout
from bslora_convert.fit.calibrated import refit_locals, residual_terms
from bslora_convert.fit.coded import Aim, local_bits, recode_locals
from bslora_convert.fit.lowrank import Delta
from bslora_convert.fit.metric import Moments


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
) -> Calibrated:
    """The form with its local parts refitted in the prompts' metric, or as it was where that is no better held out.

    codes: what the form was decoded from, if it was; as many bits are spent anew. bits: the one width of all codes, where
    they have one.
    """
    rows = workshop.encode(prompts)
    notes = list(rows.notes)
    fitted, held = split_heldout(rows.examples, Training(heldout=0.1, seed=seed))
    terms = residual_terms(deltas, form)
    factors = {name: add(*parts) for name, parts in terms.items()}
    moments = collect(
        workshop.base, workshop.reference, factors, fitted, prompts.batch_size, metric,
        lambda done: workshop.progress("calibrating", done, len(fitted)),
    )  # fmt: skip
    if codes:
        workshop.progress("coding in the metric", 0, 0)
        refitted, recoded = _recoded(form, codes, deltas, moments, uniform, bits)
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
) -> tuple[BsloraForm, dict[str, Tensor]]:
    """The form and its codes, local parts coded anew in the metric in as many bits."""
    tensors = coded_tensors(codes, Layout.of(form).tensors())
    ranks = {name: module.local.rank for name, module in form.modules.items()} if uniform else None
    aim = Aim(bits=local_bits(form, tensors), width=bits, ranks=ranks)
    found = recode_locals(deltas, form, tensors, moments, aim, next(form.tensors()).dtype)
    return found.form, to_file(found.tensors)


def distilled(
    workshop: Workshop,
    form: BsloraForm,
    prompts: Prompts,
    training: Training,
    *,
    codes: Mapping[str, Tensor] | None = None,
    heldout: Prompts | None = None,
    checkpoints: Path | None = None,
    resume: bool = False,
    began: float | None = None,
) -> Distilled:
    """The form trained against the reference.

    codes: what it was decoded from, if it was. heldout: rows that choose the state kept, instead of a share of `prompts`.
    """
    began = began or time.perf_counter()
    cache = checkpoints.with_name(f"{checkpoints.name}.completions.json") if checkpoints else None
    rows = workshop.encode(prompts, cache)
    notes = rows.notes
    if heldout is None:
        examples, held = split_heldout(rows.examples, training)
    else:
        other = workshop.encode(heldout)
        examples, held, notes = list(rows.examples), list(other.examples), (*notes, *other.notes)
    done = distill(
        workshop.base, workshop.reference, form, examples, held, training,
        codes=codes, checkpoints=checkpoints, resume=resume, began=began, progress=workshop.progress,
    )  # fmt: skip
    return Distilled(done.form, done.log, done.record, (*notes, *done.notes), done.codes)
