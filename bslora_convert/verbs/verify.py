"""`verify`: does the compact adapter behave like the LoRA that it came from, on these prompts and this base model?"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from bslora_convert.behaviour.adapter import Adapter, check_pair, read_adapter
from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.divergence import Divergence, diverge
from bslora_convert.behaviour.generation import generate, rouge_l
from bslora_convert.behaviour.intervals import few_words, too_few
from bslora_convert.behaviour.known import Known
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.saving import MEASURES, Saving
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.thresholds import Thresholds
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.extras import need
from bslora_convert.files.address import resolve
from bslora_convert.files.hashing import sha256
from bslora_convert.files.record import recorded
from bslora_convert.files.store import as_written, is_url
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.checks import check_count
from bslora_convert.results import Verification

SCHEMA_VERSION = 1
GENERATED = 12  # rows whose generations are compared, spread evenly over the file
WORST = 6  # rows that a reader sees side by side
WRITTEN_TOKENS = 64  # of a completion that the reference writes where no generations are asked for


def verify(
    compact: str | Path,
    reference: str | Path | None = None,
    base_model: str | Path | None = None,
    *,
    prompts: str | Path | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    max_length: int | None = None,
    chat_template: bool = True,
    include_path: str | Path | None = None,
    task_data: str | Path | None = None,
    max_kl: float | None = None,
    min_agreement: float | None = None,
    min_retention: float | None = None,
    max_accuracy_drop: float | None = None,
    any_reference: bool = False,
    accept_changed: bool = False,
    out: str | Path | None = None,
    save: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> Verification:
    """Compares two adapters of one base model and returns what `verify.json` holds.

    compact: a compact directory, or a plain LoRA. reference: a LoRA, or a compact directory; base_model: both default to what the
    compact directory records. prompts: a JSONL file, see `behaviour/prompts.py`. tasks: names of lm-evaluation-harness.
    any_reference: allows one that the compact adapter was not made from. accept_changed: as for `load_compact`.
    save: writes `verify.json` into the compact directory, whose fidelity.json and report.html gain the result too.
    out: a file for the result instead. overwrite: lets it replace one of more rows; see `behaviour/saving.py`.

    :raises InputError: when a file is missing or damaged, or the three don't belong together.
    :raises RecipeError: for an option that is not allowed. A missed threshold is no error: see `passed`.
    :raises OutputError: when the result could not be kept, before it is measured; `Unsaved` with the result after that.
    """
    if prompts is None and not tasks:
        raise RecipeError("nothing to measure: give prompts, tasks or both", "prompts", "tasks")
    check_counts({"limit": limit, "batch_size": batch_size, "max_length": max_length}, max_new_tokens)
    thresholds = Thresholds(max_kl, min_agreement, min_retention, max_accuracy_drop)
    thresholds.check_measured(prompts is not None, bool(tasks))
    if tasks:
        need("eval", "tasks", "tasks")
    if save:
        check_saved(compact)
    progress("reading")
    rows = None
    if prompts is not None:
        rows = Prompts.read(
            prompts, limit, max_length=max_length, max_new_tokens=max_new_tokens, chat_template=chat_template,
            batch_size=batch_size,
        )  # fmt: skip
    first = read_adapter(compact, accept_changed=accept_changed)
    known = recorded(first.path) if first.kind == "bslora" else {}
    reference = reference or _source_of(known, compact)
    name = str(base_model or first.base_model or "")
    if not name:
        raise InputError(f"{compact}: its configuration names no base model; give base_model (--base-model)")
    second = read_adapter(reference)
    check_pair(first, second)
    source = known.get("source", {}).get("sha256")
    another = source is not None and source != second.sha256
    if another and not any_reference:
        raise InputError(
            f"{reference} is not what {compact} was made from (its weights have another SHA-256); give that LoRA, or "
            "any_reference (--any-reference) to compare them all the same"
        )
    saving = Saving.plan(first, Path(out) if out is not None else None, save, overwrite, another)
    if saving is not None:
        saving.check(second, name, len(rows.rows) if rows is not None else None, tasks, limit)
    with ExitStack() as stack:  # whoever takes the base next finds nothing on it
        session = BaseModelSession(second, name, device, dtype, progress)
        stack.callback(session.close)
        base = session.base
        attached = Attached(base.model, first.form, first.carried, first.path, enabled=False)
        stack.callback(attached.remove)
        record: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "base_model": name,
            "compact": {"path": as_written(compact), "kind": first.kind, "sha256": first.sha256},
            "reference": {"path": str(reference), "kind": second.kind, "sha256": second.sha256},
            "dtype": str(base.model.dtype).removeprefix("torch."),
            "device": base.device.type,
            **dict.fromkeys(MEASURES),
            "worst": [],
            "tasks": {},
            "notes": [*first.notes, *_notes(base, first, second)],
        }
        if another:
            record["notes"].append("the reference is not what the adapter was made from")
        if rows is not None:
            measured, notes = _on_prompts(session, attached, rows, seed)
            record |= measured
            record["notes"] += notes
        if tasks:
            from bslora_convert.behaviour.harness import evaluate

            scores = evaluate(
                base,
                {"base": nullcontext(), "reference": session.reference, "compact": attached},
                tuple(tasks),
                limit=limit,
                batch_size=batch_size,
                include_path=Path(include_path) if include_path else None,
                task_data=Path(task_data) if task_data else None,
                chat_template=chat_template,
                seed=seed,
                progress=progress,
            )
            record["tasks"] = {task: found.compared(seed) for task, found in scores.items()}
            record["notes"] += [
                few_words(task, found["items"], "items")
                for task, found in record["tasks"].items()
                if too_few(found["items"])
            ]
    record["thresholds"] = thresholds.check(record)
    record["passed"] = all(checked["passed"] for checked in record["thresholds"].values())
    if saving is not None:
        saving.keep(record)
    return cast(Verification, record)


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


def check_counts(counts: Mapping[str, int | None], max_new_tokens: int) -> None:
    """:raises RecipeError: for a count that means nothing."""
    for name, value in counts.items():
        check_count(name, value)
    if max_new_tokens < 0:
        raise RecipeError(
            f"max_new_tokens is {max_new_tokens}: zero (no generations) or more is allowed", "max_new_tokens"
        )


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
    rows = session.encode(replace(prompts, max_new_tokens=prompts.max_new_tokens or WRITTEN_TOKENS))
    found = diverge(
        session.base, *_once(session), compact, rows.examples, prompts.batch_size,
        _counted(session.progress, "measuring", len(rows.examples)),
    )  # fmt: skip
    count = len(found.rows)
    few = (few_words(prompts.path.name, count, "rows"),) if too_few(count) else ()
    return {
        "prompts": {
            "rows": len(rows.rows),
            "tokens": found.tokens,
            "sha256": sha256(prompts.path),
            "cut": rows.cut,
            "completions_written": rows.written,
        },
        **found.to_dict(seed),
        **_generations(session, compact, found, replace(prompts, rows=rows.rows)),
    }, (*rows.notes, *few)


def _once(session: BaseModelSession) -> tuple[Known, Known]:
    """The original and the bare base on rows that are run once only, so that nothing is kept of them."""
    return Known(session.base, session.reference, keep=False), Known(session.base, nullcontext(), keep=False)


def _generations(session: BaseModelSession, compact: Attached, found: Divergence, prompts: Prompts) -> dict[str, Any]:
    """Generations of an even sample compared, and the worst rows with both texts."""
    measured = sorted(found.rows, key=lambda row: (-row.mean_kl, row.example.row.line))[:WORST]
    prompted = [row for row in prompts.rows if row.messages] if prompts.max_new_tokens else []
    sample = prompted[:: max(1, len(prompted) // GENERATED)][:GENERATED]
    shown = {row.line: row for row in sample}
    if prompts.max_new_tokens:
        shown |= {worst.example.row.line: worst.example.row for worst in measured if worst.example.row.messages}
    texts: dict[str, dict[int, str]] = {}
    for name, state in (("reference", session.reference), ("compact", compact)):
        said = _counted(session.progress, f"generating with {name}", len(shown))
        with state:
            written = generate(
                session.base,
                list(shown.values()),
                prompts.max_new_tokens,
                prompts.batch_size,
                prompts.chat_template,
                said,
            )
        texts[name] = dict(zip(shown, written, strict=True))
    pairs = [(texts["reference"][row.line].strip(), texts["compact"][row.line].strip()) for row in sample]
    return {
        "generation": {
            "rows": len(pairs),
            "exact_match": sum(first == second for first, second in pairs) / len(pairs),
            "rouge_l": sum(rouge_l(*both) for both in pairs) / len(pairs),
        }
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
