"""`finetune`: a compact directory distilled against the LoRA that it came from, into a new compact directory.

read both -> base model -> distil -> write beside -> read back -> measure against the LoRA -> report -> rename into place
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from bslora_convert.behaviour.checkpoints import STATE, directory_of, forget, has_completions, has_state
from bslora_convert.behaviour.prompts import Prompts, Row
from bslora_convert.bslora.storage import load_compact
from bslora_convert.conversion.request import Converted
from bslora_convert.conversion.writing import Extras, Origin, write_result
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.files.address import resolve
from bslora_convert.files.landing import check_output, landing
from bslora_convert.files.record import recorded
from bslora_convert.fit.convert import measure
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.fit.source import check_magnitude
from bslora_convert.lora import load_lora
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.checks import check_count
from bslora_convert.recipe.training import Training
from bslora_convert.results import Fidelity


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
) -> Fidelity:
    """Distils a compact adapter on one base model and returns what the new directory's `fidelity.json` holds.

    prompts: JSONL rows; the reference writes missing completions, greedily, at most `max_new_tokens` each, once for all runs.
    heldout: a file of rows for choosing the state that is kept, instead of a share of `prompts`.
    accept_changed: as for `load_compact`.
    While it runs, completions and the state after every evaluation lie in `.OUT.training` beside `out`; `resume` goes on from
    there. Completions are used again without it, too.

    :raises InputError: when something is missing or damaged, or the adapters and the base don't belong together.
    :raises RecipeError: for an option that is not allowed.
    :raises OutputError: when the output place can't be used; nothing is left behind but the checkpoints.
    """
    from bslora_convert.behaviour.adapter import read_adapter
    from bslora_convert.behaviour.distill import distill
    from bslora_convert.behaviour.processes import is_writer, meet, written_by_another
    from bslora_convert.behaviour.session import open_session
    from bslora_convert.behaviour.training_rows import TrainingRows, TrainingRun

    training, out, compact = training or Training(), Path(out), resolve(compact)
    check_output(out, overwrite, compact, resolve(reference))
    if resume and not (has_state(out) or has_completions(out)):
        raise RecipeError(
            f"resume: there is nothing to go on from, as no run towards {out} was interrupted; leave it out", "resume"
        )
    check_count("max_new_tokens", max_new_tokens)
    began = time.perf_counter()
    progress("reading")
    settings: dict[str, Any] = {
        "max_length": training.max_length,
        "max_new_tokens": max_new_tokens,
        "chat_template": training.chat_template,
        "batch_size": training.batch_size,
    }
    rows = Prompts.read(prompts, limit, **settings)
    held = Prompts.read(heldout, training.max_heldout, **settings) if heldout is not None else None
    shared = _shared(rows, held)
    student = load_compact(compact, accept_changed=accept_changed)
    source = load_lora(reference)
    if set(student.form.modules) != set(source.modules):
        raise InputError(f"{compact} and {reference} don't change the same modules; give the LoRA that it came from")
    with modules_over_cores():
        measured = measure(source.modules, source.kinds)
        check_magnitude(measured, source.weights)
    read = time.perf_counter()
    run = TrainingRun(training, out, began)
    checkpoints = directory_of(out) / STATE
    with open_session(
        reference, base_model, device, dtype, progress, read_adapter(compact, accept_changed=accept_changed)
    ) as session:
        split = TrainingRows.of_files(session, rows, held, run, closed=resume and checkpoints.is_dir())
        start = Converted(student.form, student.codes)
        done = distill(session, start, split, run, checkpoints=checkpoints, resume=resume)
    if not is_writer():
        return cast(Fidelity, written_by_another(out))
    known = recorded(compact)
    notes = (*student.notes, *known.get("notes", ()), *shared)
    extras = Extras(known.get("evidence"), done.record, done.log, (*notes, *done.notes))
    record_of = {**known.get("recipe", {}), "finetune": str(prompts), "base_model": str(base_model)}
    origin = Origin(replace(source, carried=student.carried), measured, session.adapter.sha256, str(source.path))
    with modules_over_cores(), landing(out, overwrite) as place:
        trained = time.perf_counter()
        record = write_result(
            place, Converted(done.form, done.codes), origin, record_of, extras,
            {"read": read - began, "fit": trained - read}, html=report_html, progress=progress,
        )  # fmt: skip
    forget(out)
    meet()
    return cast(Fidelity, record)


def _shared(rows: Prompts, held: Prompts | None) -> tuple[str, ...]:
    """A note where some held-out rows are trained on as well.

    :raises RecipeError: where all of them are.
    """
    if held is None:
        return ()
    trained = {(_said(row), row.completion) for row in rows.rows}
    both = sum((_said(row), row.completion) in trained for row in held.rows)
    if both == len(held.rows):
        raise RecipeError(
            f"heldout is {held.path}: all of its {both} rows are rows of {rows.path} too, so they can't say which state is "
            "better; give other rows, or a share",
            "heldout",
        )
    return (f"{both} of the {len(held.rows)} held-out rows are trained on as well",) if both else ()


def _said(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple((message["role"], message["content"]) for message in row.messages)
