"""`verify`: behaviour on prompts and benchmark tasks, against the adapter that a compact one came from."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.options import Command, given, takes
from bslora_convert.cli.screen import show_failed, table
from bslora_convert.cli.verb import Output, verb
from bslora_convert.errors import OutputError, ThresholdMissed, Unsaved
from bslora_convert.recipe.measures import MEASURES
from bslora_convert.recipe.verifying import VerifyOptions
from bslora_convert.results.behaviour import LibraryVerification, PromptsRecord, Verification

STATES = ("base", "reference", "compact")


@click.command(cls=Command)
@click.argument("compact_dir", metavar="COMPACT", type=click.Path(path_type=Path))
@takes(VerifyOptions, verb="verify")
@verb
def verify(output: Output, compact_dir: Path, **options: Any) -> None:
    """Measures how a compact adapter behaves against the LoRA that it came from.

    Exit code 1 when a threshold is missed. COMPACT may be a plain LoRA, so that any two adapters can be compared,
    or a library that batch made: then every adapter is measured, on --prompts or on those that its manifest names, and
    thresholds hold for each.

    \b
    Example:
      bslora-convert verify ./my-lora-compact --base-model ./base --prompts held-out.jsonl --save
      bslora-convert verify ./my-lora-compact --reference ./my-lora --base-model ./base --prompts held-out.jsonl \\
        --max-kl 0.01 --min-retention 0.98
      bslora-convert verify ./compact-library --prompts held-out.jsonl --limit 50 --min-retention 0.95
    """
    asked = VerifyOptions(**given(options))
    look(
        [path for path in (compact_dir, asked.reference) if path is not None],
        files=[asked.prompts],
        base_model=asked.base_model,
    )
    from bslora_convert.library.manifest import is_library

    if is_library(compact_dir):
        _library(output, compact_dir, asked)
        return
    from bslora_convert.verbs.verify import verify as run

    unsaved = None
    try:
        with output.bar("verify") as progress:
            record = run(compact_dir, options=asked, progress=progress)
    except Unsaved as error:
        record, unsaved = error.record, str(error)
    output.notes(record.notes)
    where = compact_dir / "verify.json" if asked.save else asked.out
    from bslora_convert.report import commands

    following = commands.after_verify(record, str(compact_dir))
    output.result(record, lambda console: _show(console, record, None if unsaved else where), following)
    if unsaved:
        raise OutputError(unsaved)
    if not record.passed:
        missed = [
            f"{MEASURES[name].flag} {checked.limit:g} (measured {checked.value:.4g})"
            for name, checked in record.thresholds.items()
            if not checked.passed
        ]
        raise ThresholdMissed(f"missed: {', '.join(missed)}")


def _library(output: Output, library: Path, asked: VerifyOptions) -> None:
    """Every adapter of a library; exit code 1 where one misses a threshold or can't be measured."""
    from bslora_convert.verbs.verify_library import cost, verify_library

    output.notes([f"to be measured: {cost(library, asked)}"])
    try:
        with output.bar("verify") as progress:
            result = verify_library(library, asked, progress=progress)
    except KeyboardInterrupt:
        if asked.save:
            raise KeyboardInterrupt(f"interrupted; what was measured before is kept in {library}") from None
        raise
    output.notes(result.notes)
    from bslora_convert.report import commands

    following = commands.expand(str(library)) if result.passed else None
    output.result(result, lambda console: _show_library(console, result), following)
    if result.missed:
        names = ", ".join(result.missed)
        raise ThresholdMissed(f"missed: {len(result.missed)} of {result.adapters} adapters, {names}")
    if result.bad:
        sys.exit(1)


def _show_library(console: Any, result: LibraryVerification) -> None:
    measured = [row for row in result.rows if "kl" in row]
    tasks = list(dict.fromkeys(name for row in measured for name in row["tasks"]))
    columns = ("prompts", "KL", "effect kept", "95 %", "same next token", *(f"{name}, change" for name in tasks), "")
    shown = table(["adapter"], columns)
    for row in measured:
        found = [row["tasks"].get(name) for name in tasks]
        changes = [f"{task['compact'] - task['reference']:+.4f}" if task else "" for task in found]
        shown.add_row(row["id"], *_cells(row), *changes, "" if row["passed"] else "missed")
    if measured:
        console.print(shown)
    show_failed(console, result.rows)
    words = f"{len(measured)} of {result.adapters} adapters measured"
    if result.retention and result.kl:
        kept, kl = result.retention, result.kl
        words += (
            f": at least {kept['min']:.2%} of an adapter's effect is kept, {kept['p50']:.2%} in the median; "
            f"KL {kl['p50']:.5f} in the median, {kl['max']:.5f} at most"
        )
    console.print(f"{words}.", style="bold")


def _cells(row: Mapping[str, Any]) -> list[str]:
    """What was measured of one adapter on prompts."""
    from bslora_convert.behaviour.intervals import too_few

    if row["kl"] is None:
        return [""] * 5
    low, high = row["retention_ci95"]
    rows = row["prompts"]["rows"]
    few = " (too few rows)" if too_few(rows) else ""
    kept = (f"{row['retention']:.2%}", f"{low:.2%} to {high:.2%}{few}", f"{row['agreement']:.1%}")
    return [f"{rows}", f"{row['kl']:.5f}", *kept]


def _show(console: Any, record: Verification, where: str | Path | None) -> None:
    from bslora_convert.behaviour.intervals import too_few
    from bslora_convert.report.verdict import behaviour

    if record.prompts is not None:
        _show_prompts(console, record, record.prompts)
    if record.tasks:
        shown = table(["task", "metric"], ["items", *STATES, "compact − reference, 95 %"])
        for name, task in record.tasks.items():
            low, high = task.difference_ci95
            few = " (too few items)" if too_few(task.items) else ""
            scores = [f"{task[state]:.4f}" for state in STATES]
            shown.add_row(name, task.metric, str(task.items), *scores, f"{low:+.4f} to {high:+.4f}{few}")
        console.print(shown)
    console.print(" ".join(behaviour(record)), style="bold")
    if where is not None:
        console.print(f"Written to {where}")


def _show_prompts(console: Any, record: Verification, prompts: PromptsRecord) -> None:
    from bslora_convert.report.verdict import intervals

    console.print(f"{prompts.rows} prompts, {prompts.tokens:,} tokens", style="italic")
    shown = table([""], STATES)
    shown.add_row("KL to the reference", f"{record.base_kl:.5f}", "0", f"{record.kl:.5f}")
    for title, values in (("NLL of the completion", record.nll), ("perplexity", record.perplexity)):
        shown.add_row(title, *(f"{(values or {})[state]:.4f}" for state in STATES))
    console.print(shown)
    said = (
        f"KL at the 99th percentile {record.kl_p99:.4f}, hidden states off by {record.hidden_error:.1%} of the effect"
    )
    if record.generation is not None:
        texts = record.generation
        said += f", {texts.rows} greedy texts: {texts.exact_match:.0%} equal, ROUGE-L {texts.rouge_l:.3f}"
    console.print(said)
    console.print(intervals(record))
