"""`verify`: does the compact adapter behave like the LoRA that it came from, on these prompts and this base model?"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bslora_convert.behaviour.adapter import Adapter, check_pair, read_adapter
from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.divergence import Divergence, diverge
from bslora_convert.behaviour.generation import complete, generate, rouge_l
from bslora_convert.behaviour.model import BaseModel, load_base
from bslora_convert.behaviour.prompts import Row, encode, read_prompts
from bslora_convert.errors import OutputError, RecipeError
from bslora_convert.tensorfile import read_json, sha256

SCHEMA_VERSION = 1
GENERATED = 12  # rows whose generations are compared, spread evenly over the file
WORST = 6  # rows that a reader sees side by side

Progress = Callable[[str, int, int], None]  # step, done, total (0 = unknown)


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What must hold; a measure without a threshold is only reported."""

    max_kl: float | None = None
    min_agreement: float | None = None
    min_retention: float | None = None
    max_accuracy_drop: float | None = None

    def check(self, record: dict[str, Any]) -> dict[str, Any]:
        """Each threshold that was set with the value that it met or missed.

        :raises RecipeError: when a threshold needs what was not measured.
        """
        drops = [task["reference"] - task["compact"] for task in record["tasks"].values()]
        values = {
            "max_kl": record["kl"],
            "min_agreement": record["agreement"],
            "min_retention": record["retention"],
            "max_accuracy_drop": max(drops, default=None),
        }
        checked = {}
        for name, value in values.items():
            limit = getattr(self, name)
            if limit is None:
                continue
            if value is None:
                raise RecipeError(f"{name} needs {'tasks' if 'accuracy' in name else 'prompts'}, which were not given")
            passed = value >= limit if name.startswith("min") else value <= limit
            checked[name] = {"limit": limit, "value": value, "passed": passed}
        return checked


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure."""

    limit: int | None = None
    batch_size: int = 8
    max_new_tokens: int = 64
    max_length: int | None = None
    chat_template: bool = True
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None
    task_data: Path | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}: a positive whole number is allowed")
        if self.max_new_tokens < 0:
            raise RecipeError(f"max_new_tokens is {self.max_new_tokens}: zero (no generations) or more is allowed")


def verify(
    compact: str | Path,
    reference: str | Path,
    base_model: str | Path,
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
    out: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Compares two adapters of one base model and returns what `verify.json` holds.

    compact: a compact directory, or a plain LoRA. reference: a LoRA, or a compact directory. prompts: a JSONL file, see
    `behaviour/prompts.py`. tasks: names of lm-evaluation-harness. out: where `verify.json` goes; without it, into the
    compact directory. Its fidelity.json and report.html gain the result too.

    :raises InputError: when a file is missing or damaged, or the three don't belong together.
    :raises RecipeError: for an option that is not allowed. A missed threshold is no error: see `passed`.
    """
    if prompts is None and not tasks:
        raise RecipeError("nothing to measure: give prompts, tasks or both")
    settings = Settings(
        limit, batch_size, max_new_tokens, max_length, chat_template, tuple(tasks),
        Path(include_path) if include_path else None, Path(task_data) if task_data else None, seed,
    )  # fmt: skip
    thresholds = Thresholds(max_kl, min_agreement, min_retention, max_accuracy_drop)
    progress("reading", 0, 0)
    first, second = read_adapter(compact), read_adapter(reference)
    check_pair(first, second)
    rows = read_prompts(prompts, limit) if prompts is not None else []
    progress("loading the base model", 0, 0)
    base = load_base(base_model, device, dtype)
    pair = _Pair(base, first, second)
    record: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "base_model": str(base_model),
        "compact": {"path": str(compact), "kind": first.kind, "sha256": first.sha256},
        "reference": {"path": str(reference), "kind": second.kind, "sha256": second.sha256},
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "device": base.device.type,
        **_nothing_measured(),
        "notes": _notes(base, first, second),
    }
    if prompts is not None:
        record |= _on_prompts(pair, rows, settings, progress, record["notes"])
        record["prompts"]["sha256"] = sha256(Path(prompts))
    if tasks:
        from bslora_convert.behaviour.harness import evaluate

        record["tasks"] = evaluate(
            base,
            {"base": nullcontext(), "reference": pair.reference, "compact": pair.compact},
            settings.tasks,
            limit=limit,
            batch_size=batch_size,
            include_path=settings.include_path,
            task_data=settings.task_data,
            chat_template=chat_template,
            seed=seed,
            progress=lambda step: progress(step, 0, 0),
        )
    record["thresholds"] = thresholds.check(record)
    record["passed"] = all(checked["passed"] for checked in record["thresholds"].values())
    _save(record, first, second, Path(out) if out else None)
    return record


class _Pair:
    """Both adapters on one base model, none of them active."""

    def __init__(self, base: BaseModel, compact: Adapter, reference: Adapter) -> None:
        self.base = base
        self.reference, self.compact = (
            Attached(base.model, adapter.form, adapter.carried, adapter.path, enabled=False)
            for adapter in (reference, compact)
        )


def _nothing_measured() -> dict[str, Any]:
    measures = (
        "prompts",
        "kl",
        "kl_p99",
        "agreement",
        "nll",
        "perplexity",
        "base_kl",
        "retention",
        "hidden_error",
        "generation",
    )
    return {**dict.fromkeys(measures), "generation": None, "worst": [], "tasks": {}}


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
    pair: _Pair, rows: Sequence[Row], settings: Settings, progress: Progress, notes: list[str]
) -> dict[str, Any]:
    base = pair.base
    without = sum(row.completion is None for row in rows)
    written = list(rows)
    if without:
        notes.append(f"{without} rows had no completion; the reference wrote it, greedily")
        with pair.reference:
            written, _ = complete(
                base, rows, {}, settings.max_new_tokens or 64, 4 * settings.batch_size, settings.chat_template, progress
            )
    context = min(base.context, settings.max_length or base.context)
    examples = [encode(row, base.tokenizer, context, settings.chat_template) for row in written]
    cut = sum(example.cut for example in examples)
    if cut:
        notes.append(f"{cut} of {len(examples)} rows are longer than {context} tokens and were cut to that")
    found = diverge(
        base, pair.reference, pair.compact, examples, settings.batch_size,
        lambda done: progress("measuring", done, len(examples)),
    )  # fmt: skip
    return {
        "prompts": {
            "rows": len(rows),
            "tokens": found.tokens,
            "sha256": "",
            "cut": cut,
            "completions_written": without,
        },
        **found.to_dict(),
        **_generations(pair, found, written, settings, progress),
    }


def _generations(
    pair: _Pair, found: Divergence, rows: Sequence[Row], settings: Settings, progress: Progress
) -> dict[str, Any]:
    """Generations of an even sample compared, and the worst rows with both texts."""
    measured = sorted(found.rows, key=lambda row: (-row[1], row[0].row.line))[:WORST]
    prompted = [row for row in rows if row.messages]
    step = max(1, len(prompted) // GENERATED)
    sample = prompted[::step][:GENERATED] if settings.max_new_tokens else []
    shown = {row.line: row for row in sample}
    if settings.max_new_tokens:
        shown |= {example.row.line: example.row for example, _, _ in measured if example.row.messages}
    texts: dict[str, dict[int, str]] = {}
    for name, state in (("reference", pair.reference), ("compact", pair.compact)):
        with state:
            written = _generate(pair.base, list(shown.values()), settings, f"generating with {name}", progress)
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
                "line": example.row.line,
                "kl": kl,
                "tokens": tokens,
                "prompt": example.row.prompt,
                "completion": example.row.completion,
                "reference": texts["reference"].get(example.row.line),
                "compact": texts["compact"].get(example.row.line),
            }
            for example, kl, tokens in measured
        ],
    }


def _generate(base: BaseModel, rows: Sequence[Row], settings: Settings, step: str, progress: Progress) -> list[str]:
    # Four times the batch: a step of generation holds one position a row.
    return generate(
        base, rows, settings.max_new_tokens, 4 * settings.batch_size, settings.chat_template,
        lambda done: progress(step, done, len(rows)),
    )  # fmt: skip


def _save(record: dict[str, Any], compact: Adapter, reference: Adapter, out: Path | None) -> None:
    """verify.json, and into a compact directory's own record and page where the reference is what it was made from."""
    from bslora_convert import report

    fidelity, page = compact.path / report.FIDELITY_NAME, compact.path / report.REPORT_NAME
    known = read_json(fidelity) if compact.kind == "bslora" and fidelity.is_file() else None
    if known is not None and known.get("source", {}).get("sha256") != reference.sha256:
        record["notes"].append(
            "the reference is not what the adapter was made from, so its fidelity.json stays as it is"
        )
        known = None
    if out is None and compact.kind == "bslora":
        out = compact.path / "verify.json"
    if out is not None:
        _replace(out, json.dumps(record, indent=1) + "\n")
    if known is not None:
        _replace(fidelity, json.dumps({**known, "functional": record}, indent=1) + "\n")
        if page.is_file():
            _replace(page, report.with_functional(page.read_text(encoding="utf-8"), record))


def _replace(path: Path, text: str) -> None:
    """Writes a file beside and renames it into place.

    :raises OutputError: when it can't be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(f"{path}: can't be written ({error.strerror or error})") from error
