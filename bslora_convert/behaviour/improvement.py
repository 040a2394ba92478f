"""What the base model can do for a fitted form: calibration, then distillation, on one base in memory.

Both are optional and neither can make the result worse on the rows that they hold out.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.calibrate import collect
from bslora_convert.behaviour.distill import Distilled, distill, split_heldout
from bslora_convert.behaviour.divergence import heldout_kl
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.training import Training
from bslora_convert.behaviour.workshop import Workshop
from bslora_convert.bslora.factors import Factors
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.fit.calibrated import refit_locals, residual_terms
from bslora_convert.fit.lowrank import Delta


def calibrated(
    workshop: Workshop,
    form: BsloraForm,
    deltas: Mapping[str, Delta],
    prompts: Prompts,
    metric: str,
    uniform: bool,
    seed: int,
) -> tuple[BsloraForm, dict[str, Any], list[str]]:
    """The form with its local parts refitted in the prompts' metric, or as it was where that is no better held out."""
    rows = workshop.encode(prompts)
    notes = list(rows.notes)
    fitted, held = split_heldout(rows.examples, Training(heldout=0.1, seed=seed))
    terms = residual_terms(deltas, form)
    stacked = {
        name: Factors(torch.cat([part.b for part in parts], 1), torch.cat([part.a for part in parts], 0))
        for name, parts in terms.items()
    }
    moments = collect(
        workshop.base, workshop.reference, stacked, fitted, prompts.batch_size, metric,
        lambda done: workshop.progress("calibrating", done, len(fitted)),
    )  # fmt: skip
    refitted = refit_locals(form, terms, moments, uniform)
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
    return (refitted if kept == "calibrated" else form), record, notes


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
