"""`verify`: does the compact adapter behave like the LoRA that it came from, on these prompts and this base model?"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bslora_convert.behaviour.adapter import Adapter, check_pair, read_adapter
from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.divergence import Divergence, diverge
from bslora_convert.behaviour.generation import generate, rouge_l
from bslora_convert.behaviour.intervals import few_words, too_few
from bslora_convert.behaviour.known import Known
from bslora_convert.behaviour.loaded import bare_of
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.saving import OF_PROMPTS, Saving
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.thresholds import checked_limits
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.extras import need
from bslora_convert.files.address import resolve
from bslora_convert.files.hashing import sha256
from bslora_convert.files.record import recorded
from bslora_convert.files.store import as_written, is_url
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.options import built
from bslora_convert.recipe.verifying import VerifyOptions
from bslora_convert.report.functional import with_functional
from bslora_convert.report.library_files import library_of, refresh
from bslora_convert.results.behaviour import AdapterRecord, GenerationRecord, PromptsRecord, TaskRecord, Verification

SCHEMA_VERSION = 1
GENERATED = 12  # rows whose generations are compared, spread evenly over the file
WORST = 6  # rows that a reader sees side by side
WRITTEN_TOKENS = 64  # of a completion that the reference writes where no generations are asked for


def verify(
    compact: str | Path,
    reference: str | Path | None = None,
    base_model: str | Path | None = None,
    *,
    options: VerifyOptions | None = None,
    in_library: bool = True,
    progress: Progress = silent,
    **fields: Any,
) -> Verification:
    """Compares two adapters of one base model and returns what `verify.json` holds.

    compact: a compact directory, or a plain LoRA. reference: a LoRA, or a compact directory; base_model: both default to what the
    compact directory records. options, or fields of `VerifyOptions`: what to measure (prompts, tasks), limits, where to write.
    save: writes `verify.json` into the compact directory, whose fidelity.json and report.html gain the result too. in_library:
    whether the library that it is an adapter of, if any, gains it as well.
    out: a file for the result instead. overwrite: lets it replace one of more rows; see `behaviour/saving.py`.

    :raises InputError: when a file is missing or damaged, or the three don't belong together.
    :raises RecipeError: for an option that is not allowed. A missed threshold is no error: see `passed`.
    :raises OutputError: when the result could not be kept, before it is measured; `Unsaved` with the result after that.
    """
    given = {"reference": reference, "base_model": base_model}
    asked = built(
        VerifyOptions, options, {**fields, **{name: value for name, value in given.items() if value is not None}}
    )
    asked.check_measured(asked.prompts is not None)
    if asked.tasks:
        need("eval", "tasks", "tasks")
    if asked.save:
        check_saved(compact)
    progress("reading")
    rows = _rows(asked)
    pair = _Compared.read(compact, asked)
    saving = Saving.plan(pair.compact, asked, pair.is_another)
    if saving is not None:
        saving.check(pair.reference, pair.base_model, len(rows.rows) if rows is not None else None, asked)
    record = _measured(pair, rows, asked, progress)
    if saving is not None:
        saving.keep(record, with_functional)
        above = library_of(pair.compact.path) if asked.save and in_library else None
        if above is not None and (said := refresh(above)) is not None:
            return replace(record, notes=[*record.notes, said])
    return record


def _rows(asked: VerifyOptions) -> Prompts | None:
    """The rows of the prompt file, read before anything is computed."""
    if asked.prompts is None:
        return None
    return Prompts.read(
        asked.prompts, asked.limit, max_length=asked.max_length, max_new_tokens=asked.max_new_tokens,
        chat_template=asked.chat_template, batch_size=asked.batch_size,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Compared:
    """The two adapters and the name of their base model. is_another: whether the reference is not what the compact one is of."""

    name: str | Path
    compact: Adapter
    reference_name: str | Path
    reference: Adapter
    base_model: str
    is_another: bool

    @classmethod
    def read(cls, compact: str | Path, asked: VerifyOptions) -> "_Compared":
        """:raises InputError: when one is missing or damaged, or they don't belong together."""
        first = read_adapter(compact, accept_changed=asked.accept_changed)
        known = recorded(first.path) if first.kind == "bslora" else {}
        reference = asked.reference or _source_of(known, compact)
        base_model = str(asked.base_model or first.base_model or "")
        if not base_model:
            raise InputError(f"{compact}: its configuration names no base model; give base_model (--base-model)")
        second = read_adapter(reference)
        check_pair(first, second)
        source = known.get("source", {}).get("sha256")
        another = source is not None and source != second.sha256
        if another and not asked.any_reference:
            raise InputError(
                f"{reference} is not what {compact} was made from (its weights have another SHA-256); give that LoRA, or "
                "any_reference (--any-reference) to compare them all the same"
            )
        return cls(compact, first, reference, second, base_model, another)


def _measured(pair: _Compared, rows: Prompts | None, asked: VerifyOptions, progress: Progress) -> Verification:
    """Every measure, on the base model."""
    first, second = pair.compact, pair.reference
    with ExitStack() as stack:  # whoever takes the base next finds nothing on it
        session = BaseModelSession(second, pair.base_model, asked.device, asked.dtype, progress)
        stack.callback(session.close)
        base = session.base
        attached = Attached(base.model, first.form, first.carried, first.path, enabled=False)
        stack.callback(attached.remove)
        notes = [*first.notes, *_notes(base, first, second)]
        if pair.is_another:
            notes.append("the reference is not what the adapter was made from")
        measured: dict[str, Any] = {**dict.fromkeys(OF_PROMPTS), "worst": []}
        if rows is not None:
            found, said = _on_prompts(session, attached, rows, asked.seed)
            measured |= found
            notes += said
        tasks: dict[str, TaskRecord] = {}
        if asked.tasks:
            from bslora_convert.behaviour.harness import evaluate

            states: dict[str, AbstractContextManager[Any]] = {
                "base": nullcontext(),
                "reference": session.reference,
                "compact": attached,
            }
            tasks = {
                task: found.compared(asked.seed) for task, found in evaluate(base, states, asked, progress).items()
            }
            notes += [few_words(name, task.items, "items") for name, task in tasks.items() if too_few(task.items)]
        thresholds = checked_limits({**measured, "tasks": tasks}, asked.limits)
        return Verification(
            schema_version=SCHEMA_VERSION,
            when=datetime.now(UTC).date().isoformat(),
            base_model=pair.base_model,
            compact=AdapterRecord(path=as_written(pair.name), kind=first.kind, sha256=first.sha256),
            reference=AdapterRecord(path=str(pair.reference_name), kind=second.kind, sha256=second.sha256),
            dtype=str(base.model.dtype).removeprefix("torch."),
            device=base.device.type,
            **measured,
            tasks=tasks,
            notes=notes,
            thresholds=thresholds,
            passed=all(checked.passed for checked in thresholds.values()),
        )


def _source_of(known: Mapping[str, Any], compact: str | Path) -> str:
    """The LoRA that a compact directory was made from, by its record.

    :raises InputError: when no record says, or it is not there any more.
    """
    path = known.get("source", {}).get("path")
    if not isinstance(path, str) or not path:
        raise InputError(f"{compact}: no record says what it was made from; give reference (--reference)")
    if not resolve(path).exists():
        raise InputError(
            f"{compact}: it was made from {path}, which is not there from here; give reference (--reference)"
        )
    return path


def check_saved(compact: str | Path) -> None:
    """Refuses to keep a result where the adapter lies elsewhere.

    :raises RecipeError: naming the option.
    """
    if is_url(compact) and not Path(compact).exists():
        raise RecipeError(f"save: {as_written(compact)} is elsewhere, and what was fetched of it is not kept", "save")


def _notes(base: BaseModel, compact: Adapter, reference: Adapter) -> list[str]:
    notes = []
    if set(compact.form.modules) != set(reference.form.modules):
        differing = set(compact.form.modules) ^ set(reference.form.modules)
        notes.append(f"the adapters change different modules: {len(differing)} are changed by one of them only")
    named = reference.base_model or compact.base_model
    if named and not Path(base.name).is_dir() and named != base.name:
        notes.append(f"the adapters were made for {named}, measured on {base.name}")
    return notes


def _on_prompts(
    session: BaseModelSession, compact: Attached, prompts: Prompts, seed: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Every measure that needs prompts, and notes."""
    asked = replace(prompts, max_new_tokens=prompts.max_new_tokens or WRITTEN_TOKENS)
    rows = session.encode(asked)
    without = {row.line for row in prompts.rows if row.completion is None}
    written = {row.line: row.completion or "" for row in rows.rows if row.line in without}
    found = diverge(
        session.base, *_once(session), compact, rows.examples, prompts.batch_size,
        _counted(session.progress, "measuring", len(rows.examples)),
    )  # fmt: skip
    count = len(found.rows)
    few = (few_words(prompts.path.name, count, "rows"),) if too_few(count) else ()
    return {
        "prompts": PromptsRecord(
            rows=len(rows.rows),
            tokens=found.tokens,
            sha256=sha256(prompts.path),
            cut=rows.cut,
            completions_written=rows.written,
        ),
        **found.to_dict(seed),
        **_generations(session, compact, found, replace(prompts, rows=rows.rows), written),
    }, (*rows.notes, *few)


def _once(session: BaseModelSession) -> tuple[Known, Known]:
    """The original, on rows that are run once only, so that nothing is kept of them, and the bare base."""
    return Known(session.base, session.reference, keep=False), bare_of(session.base)


def _generations(
    session: BaseModelSession, compact: Attached, found: Divergence, prompts: Prompts, written: Mapping[int, str]
) -> dict[str, Any]:
    """Generations of an even sample compared, and the worst rows with both texts. written: the original's completions by line."""
    measured = sorted(found.rows, key=lambda row: (-row.mean_kl, row.example.row.line))[:WORST]
    prompted = [row for row in prompts.rows if row.messages] if prompts.max_new_tokens else []
    sample = prompted[:: max(1, len(prompted) // GENERATED)][:GENERATED]
    shown = {row.line: row for row in sample}
    if prompts.max_new_tokens:
        shown |= {worst.example.row.line: worst.example.row for worst in measured if worst.example.row.messages}
    texts: dict[str, dict[int, str]] = {}
    for name, state in (("reference", session.reference), ("compact", compact)):
        known = {line: written[line] for line in shown if line in written} if name == "reference" else {}
        rows = [row for line, row in shown.items() if line not in known]
        said = _counted(session.progress, f"generating with {name}", len(rows))
        with state:
            found_texts = generate(
                session.base, rows, prompts.max_new_tokens, prompts.batch_size, prompts.chat_template, said
            )
        texts[name] = known | dict(zip((row.line for row in rows), found_texts, strict=True))
    pairs = [(texts["reference"][row.line].strip(), texts["compact"][row.line].strip()) for row in sample]
    return {
        "generation": GenerationRecord(
            rows=len(pairs),
            exact_match=sum(first == second for first, second in pairs) / len(pairs),
            rouge_l=sum(rouge_l(*both) for both in pairs) / len(pairs),
        )
        if pairs
        else None,
        "worst": [
            {
                "line": row.line,
                "kl": sums.mean_kl,
                "tokens": sums.tokens,
                "prompt": row.prompt,
                "completion": row.completion,
                "reference": texts["reference"].get(row.line),
                "compact": texts["compact"].get(row.line),
            }
            for sums in measured
            for row in (sums.example.row,)
        ],
    }


def _counted(progress: Progress, step: str, total: int) -> Callable[[int], None]:
    return lambda done: progress(step, done, total)
