"""`finetune`: a compact directory distilled against the LoRA that it came from, into a new compact directory.

read both -> base model -> distil -> write beside -> read back -> measure against the LoRA -> report -> rename into place
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.training import Training
from bslora_convert.bslora.storage import load_compact
from bslora_convert.errors import InputError
from bslora_convert.files.address import resolve
from bslora_convert.files.landing import check_apart, check_output, landing
from bslora_convert.files.record import recorded
from bslora_convert.fit.convert import measure
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.lora import load_lora
from bslora_convert.progress import Progress, silent
from bslora_convert.result import Extras, write_result

STATE = "state"  # directory of the checkpoint beside the output


def finetune(
    compact: str | Path,
    out: str | Path,
    reference: str | Path,
    base_model: str,
    prompts: str | Path,
    training: Training | None = None,
    *,
    heldout: str | Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 128,
    resume: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    overwrite: bool = False,
    accept_changed: bool = False,
    report_html: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Distils a compact adapter on one base model and returns what the new directory's `fidelity.json` holds.

    prompts: JSONL rows; the reference writes missing completions, greedily, at most `max_new_tokens` each, once for all runs.
    heldout: a file of rows for choosing the state that is kept, instead of a share of `prompts`.
    accept_changed: as for `load_compact`.
    While it runs, the state after every evaluation lies in `.OUT.training` beside `out`; `resume` goes on from there.

    :raises InputError: when something is missing or damaged, or the adapters and the base don't belong together.
    :raises RecipeError: for an option that is not allowed.
    :raises OutputError: when the output place can't be used; nothing is left behind but the checkpoints.
    """
    from bslora_convert.behaviour.adapter import read_adapter
    from bslora_convert.behaviour.improvement import distilled
    from bslora_convert.behaviour.processes import is_writer, meet, written_by_another
    from bslora_convert.behaviour.workshop import open_workshop

    training, out, compact = training or Training(), Path(out), resolve(compact)
    for given in (compact, resolve(reference)):
        check_apart(given, out)
    check_output(out, overwrite)
    began = time.perf_counter()
    progress("reading", 0, 0)
    settings: dict[str, Any] = {
        "max_length": training.max_length,
        "max_new_tokens": max_new_tokens,
        "chat_template": training.chat_template,
        "batch_size": training.batch_size,
    }
    rows = Prompts.read(prompts, limit, **settings)
    held = Prompts.read(heldout, training.max_heldout, **settings) if heldout is not None else None
    student = load_compact(compact, accept_changed=accept_changed)
    source = load_lora(reference)
    if set(student.form.modules) != set(source.modules):
        raise InputError(f"{compact} and {reference} don't change the same modules; give the LoRA that it came from")
    with modules_over_cores():
        measured = measure(source.modules, source.kinds)
    read = time.perf_counter()
    workshop = open_workshop(
        reference, base_model, device, dtype, progress, read_adapter(compact, accept_changed=accept_changed)
    )
    checkpoints = _checkpoints(out)
    done = distilled(
        workshop,
        student.form,
        rows,
        training,
        codes=student.codes,
        heldout=held,
        checkpoints=checkpoints / STATE,
        resume=resume,
        began=began,
    )
    if not is_writer():
        return written_by_another(out)
    known = recorded(compact)
    extras = Extras(
        known.get("calibration"),
        done.record,
        done.log,
        (*student.notes, *known.get("notes", ()), *done.notes),
        codes=done.codes,
    )
    record_of = {
        **known.get("recipe", {}),
        "finetune": str(prompts),
        "base_model": str(base_model),
    }
    with modules_over_cores(), landing(out, overwrite) as place:
        trained = time.perf_counter()
        record = write_result(
            place, done.form, replace(source, carried=student.carried), measured, workshop.adapter.sha256, record_of, extras,
            {"read": read - began, "fit": trained - read}, html=report_html,
            progress=lambda step: progress(step, 0, 0),
        )  # fmt: skip
    shutil.rmtree(checkpoints, ignore_errors=True)
    meet()
    return record


def is_resumable(out: str | Path) -> bool:
    """Whether an interrupted run towards `out` left a state to go on from."""
    return (_checkpoints(Path(out)) / STATE).is_dir()


def _checkpoints(out: Path) -> Path:
    return out.absolute().parent / f".{out.name}.training"
