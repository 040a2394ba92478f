"""`finetune`: a compact directory distilled against the LoRA that it came from, into a new compact directory.

read both -> base model -> distil -> write beside -> read back -> measure against the LoRA -> report -> rename into place
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bslora_convert.behaviour.adapter import Adapter, check_pair
from bslora_convert.behaviour.checkpoints import STATE, directory_of, forget, has_completions, has_state
from bslora_convert.behaviour.distill import distill
from bslora_convert.behaviour.processes import is_writer, meet, written_by_another
from bslora_convert.behaviour.prompts import Prompts, Row
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.training_rows import TrainingRows, TrainingRun
from bslora_convert.bslora.common import carry, named_in
from bslora_convert.bslora.storage import CompactAdapter, load_compact
from bslora_convert.conversion.initial import recalled
from bslora_convert.conversion.request import Converted
from bslora_convert.conversion.writing import Extras, Origin, write_result
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.files.address import resolve
from bslora_convert.files.hashing import sha256
from bslora_convert.files.landing import check_output, landing
from bslora_convert.files.record import recorded
from bslora_convert.files.store import as_written
from bslora_convert.fit.convert import Source, measure
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.fit.source import check_magnitude
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.finetuning import FinetuneOptions
from bslora_convert.recipe.options import built
from bslora_convert.recipe.training import Training
from bslora_convert.report.conversion import publish
from bslora_convert.results.adapter import EvidenceRecord, Fidelity


def finetune(
    compact: str | Path,
    out: str | Path,
    reference: str | Path,
    base_model: str,
    prompts: str | Path,
    training: Training | None = None,
    options: FinetuneOptions | None = None,
    *,
    progress: Progress = silent,
    **fields: Any,
) -> Fidelity:
    """Distils a compact adapter on one base model and returns what the new directory's `fidelity.json` holds.

    prompts: JSONL rows; the reference writes missing completions, greedily, once for all runs.
    options, or fields of `FinetuneOptions`: heldout is a file of rows that choose the state that is kept, or another share.
    While it runs, completions and the state after every evaluation lie in `.OUT.training` beside `out`; `resume` goes on from
    there. Completions are used again without it, too.

    :raises InputError: when something is missing or damaged, or the adapters and the base don't belong together.
    :raises RecipeError: for an option that is not allowed.
    :raises OutputError: when the output place can't be used; nothing is left behind but the checkpoints.
    """
    asked, training = built(FinetuneOptions, options, fields), training or Training()
    if isinstance(asked.heldout, int | float):
        training, asked = replace(training, heldout=float(asked.heldout)), replace(asked, heldout=None)
    out, compact = Path(out), resolve(compact)
    check_output(out, asked.overwrite, compact, resolve(reference))
    if asked.resume and not (has_state(out) or has_completions(out)):
        raise RecipeError(
            f"resume: there is nothing to go on from, as no run towards {out} was interrupted; leave it out", "resume"
        )
    began = time.perf_counter()
    progress("reading")
    rows, held, shared = _rows(prompts, asked, training)
    pair = _Sides.read(compact, reference, asked.accept_changed)
    known = recorded(compact)
    evidence = EvidenceRecord.from_dict(known["evidence"]) if known.get("evidence") else None
    read = time.perf_counter()
    reference_adapter = Adapter.of_lora(pair.source, resolve(reference), sha256(pair.source.weights))
    check_pair(Adapter.of_compact(pair.student), reference_adapter)
    run, checkpoints = TrainingRun(training, out, began), directory_of(out) / STATE
    with BaseModelSession(reference_adapter, base_model, asked.device, asked.base_dtype, progress) as session:
        rows_of = TrainingRows.of_files(session, rows, held, run, closed=asked.resume and checkpoints.is_dir())
        done = distill(session, pair.start, rows_of, run, checkpoints=checkpoints, resume=asked.resume)
    if not is_writer():
        return Fidelity.from_dict(written_by_another(out))
    notes = (*pair.student.notes, *known.get("notes", ()), *shared, *done.notes)
    extras = Extras(evidence, done.record, done.log, notes)
    recipe = {**known.get("recipe", {}), "finetune": str(prompts), "base_model": str(base_model)}
    source = replace(pair.source, carried=pair.student.carried)
    origin = Origin(
        source, pair.measured, session.adapter.sha256, as_written(source.path), recalled(known, pair.student.initial)
    )
    common = named_in(pair.student.config)
    if common is not None:
        carry(common, compact, out)
    with modules_over_cores(), landing(out, asked.overwrite) as place:
        trained = time.perf_counter()
        seconds = {"read": read - began, "fit": trained - read}
        written = write_result(
            place, replace(pair.start, form=done.form, codes=done.codes), origin, recipe, extras, seconds, progress
        )
        record = publish(place, written, html=asked.report_html)
    forget(out)
    meet()
    return record


def _rows(
    prompts: str | Path, asked: FinetuneOptions, training: Training
) -> tuple[Prompts, Prompts | None, tuple[str, ...]]:
    """The rows of the prompt file, those of a held-out file, and a note where some stand in both."""
    rows = Prompts.read(prompts, **training.reading)
    if asked.heldout is None:
        return rows, None, ()
    held = Prompts.read(str(asked.heldout), **{**training.reading, "limit": training.max_heldout})
    return rows, held, _shared(rows, held)


@dataclass(frozen=True, slots=True)
class _Sides:
    """The compact adapter that is trained, the LoRA that it came from, and that one's deltas measured."""

    student: CompactAdapter
    source: LoraAdapter
    measured: Source

    @property
    def start(self) -> Converted:
        """What the training begins with."""
        return Converted(self.student.form, self.student.codes, initial=self.student.initial)

    @classmethod
    def read(cls, compact: Path, reference: str | Path, accept_changed: bool) -> "_Sides":
        """:raises InputError: when one is missing or damaged, or they don't belong together."""
        student = load_compact(compact, accept_changed=accept_changed)
        source = load_lora(reference)
        if set(student.form.modules) != set(source.modules):
            raise InputError(
                f"{compact} and {reference} don't change the same modules; give the LoRA that it came from"
            )
        with modules_over_cores():
            measured = measure(source.modules, source.kinds)
            check_magnitude(measured, source.weights)
        return cls(student, source, measured)


def _shared(rows: Prompts, held: Prompts) -> tuple[str, ...]:
    """A note where some held-out rows are trained on as well.

    :raises RecipeError: where all of them are.
    """
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
