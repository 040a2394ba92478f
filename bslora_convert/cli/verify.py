"""`verify`: behaviour on prompts and benchmark tasks, against the adapter that a compact one came from."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.verb import Output, accept_changed_option, verb
from bslora_convert.errors import OutputError, ThresholdMissed, Unsaved
from bslora_convert.files.address import is_library


@click.command()
@click.argument("compact_dir", metavar="COMPACT", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="The LoRA that it came from.  [default: what COMPACT was made from]",
)
@click.option(
    "--base-model", help="Directory of the base model, or its name on the hub.  [default: what COMPACT names]"
)
@click.option("--any-reference", is_flag=True, help="Allow a reference that COMPACT was not made from.")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL file of prompts, gzip accepted.")
@click.option("--tasks", help="Names of lm-evaluation-harness, by commas (extra eval); local_* read --task-data.")
@click.option("--include-path", type=click.Path(path_type=Path), help="Directory of more task files (YAML).")
@click.option(
    "--task-data", type=click.Path(path_type=Path), help="Directory of local JSON that the local_* tasks read."
)
@click.option("--limit", type=int, help="First N prompts, or items of each task.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Rows at once.")
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Length of generations; 0 = none.")
@click.option("--max-length", type=int, help="Longest row in tokens.  [default: the model's context]")
@click.option("--chat-template/--no-chat-template", default=True, show_default=True, help="Prompts as a user's turn.")
@click.option("--max-kl", type=float, help="Threshold: KL to the reference in nats a token.")
@click.option("--min-agreement", type=float, help="Threshold: share of tokens with the same first choice.")
@click.option("--min-retention", type=float, help="Threshold: share of the adapter's effect that survived.")
@click.option("--max-accuracy-drop", type=float, help="Threshold: largest drop of a task's score.")
@click.option("--out", type=click.Path(path_type=Path), help="File for the result, outside of COMPACT.")
@click.option("--save", is_flag=True, help="Write verify.json into COMPACT, and its record and page.")
@click.option("--overwrite", is_flag=True, help="Let the result replace one of more rows or items.")
@accept_changed_option
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype", default="auto", show_default=True, help="auto (float32 on a CPU), float32, bfloat16 or float16."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the intervals and of few-shot examples.")
@verb
def verify(output: Output, compact_dir: Path, tasks: str | None, **options: Any) -> None:
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
    look(
        [path for path in (compact_dir, options["reference"]) if path is not None],
        files=[options["prompts"]],
        base_model=options["base_model"],
    )
    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if is_library(compact_dir):
        _library(output, compact_dir, {**options, "tasks": names})
        return
    from bslora_convert.verbs.verify import verify as run

    unsaved = None
    record: Mapping[str, Any]
    try:
        with output.bar("verify") as progress:
            record = run(compact_dir, tasks=names, progress=progress, **options)
    except Unsaved as error:
        record, unsaved = error.record, str(error)
    output.notes(record["notes"])
    where = compact_dir / "verify.json" if options["save"] else options["out"]
    from bslora_convert.report import commands

    following = commands.after_verify(record, str(compact_dir))
    output.result(record, lambda console: _show(console, record, None if unsaved else where), following)
    if unsaved:
        raise OutputError(unsaved)
    if not record["passed"]:
        missed = [
            f"--{name.replace('_', '-')} {checked['limit']:g} (measured {checked['value']:.4g})"
            for name, checked in record["thresholds"].items()
            if not checked["passed"]
        ]
        raise ThresholdMissed(f"missed: {', '.join(missed)}")


def _library(output: Output, library: Path, options: dict[str, Any]) -> None:
    """Every adapter of a library; exit code 1 where one misses a threshold or can't be measured."""
    from bslora_convert.verbs.verify_library import verify_library

    try:
        with output.bar("verify") as progress:
            result = verify_library(library, progress=progress, **options)
    except KeyboardInterrupt:
        if options["save"]:
            raise KeyboardInterrupt(f"interrupted; what was measured before is kept in {library}") from None
        raise
    output.notes(result["notes"])
    from bslora_convert.report import commands

    following = commands.expand(str(library)) if result["passed"] else None
    output.result(result, lambda console: _show_library(console, result), following)
    if result["missed"]:
        names = ", ".join(result["missed"])
        raise ThresholdMissed(f"missed: {len(result['missed'])} of {result['adapters']} adapters, {names}")
    if result["bad"]:
        sys.exit(1)


def _show_library(console: Any, result: Mapping[str, Any]) -> None:
    from rich.table import Table

    from bslora_convert.behaviour.intervals import too_few

    measured = [row for row in result["rows"] if "kl" in row]
    tasks = list(dict.fromkeys(name for row in measured for name in row["tasks"]))
    table = Table()
    table.add_column("adapter", no_wrap=True)
    for column in ("prompts", "KL", "survived", "95 %", "same next token", *(f"{name}, change" for name in tasks), ""):
        table.add_column(column, justify="right")
    for row in measured:
        cells = [""] * 5
        if row["kl"] is not None:
            low, high = row["retention_ci95"]
            few = " (too few rows)" if too_few(row["prompts"]["rows"]) else ""
            cells = [
                f"{row['prompts']['rows']}", f"{row['kl']:.5f}", f"{row['retention']:.2%}",
                f"{low:.2%} to {high:.2%}{few}", f"{row['agreement']:.1%}",
            ]  # fmt: skip
        found = [row["tasks"].get(name) for name in tasks]
        changes = [f"{task['compact'] - task['reference']:+.4f}" if task else "" for task in found]
        table.add_row(row["id"], *cells, *changes, "" if row["passed"] else "missed")
    if measured:
        console.print(table)
    for row in result["rows"]:
        if row["status"] != "ok":
            console.print(f"{row['id']}: {row['message']}", style="yellow", soft_wrap=True)
    words = f"{len(measured)} of {result['adapters']} adapters measured"
    if result["retention"]:
        kept, kl = result["retention"], result["kl"]
        words += (
            f": at least {kept['min']:.2%} of an adapter's effect survived, {kept['p50']:.2%} in the median; "
            f"KL {kl['p50']:.5f} in the median, {kl['max']:.5f} at most"
        )
    console.print(f"{words}.", style="bold")


def _show(console: Any, record: Mapping[str, Any], where: Path | None) -> None:
    from rich.table import Table

    from bslora_convert.behaviour.intervals import too_few
    from bslora_convert.report.verdict import behaviour, intervals

    if record["kl"] is not None:
        console.print(f"{record['prompts']['rows']} prompts, {record['prompts']['tokens']:,} tokens", style="italic")
        table = Table()
        table.add_column("")
        for column in ("base", "reference", "compact"):
            table.add_column(column, justify="right")
        table.add_row("KL to the reference", f"{record['base_kl']:.5f}", "0", f"{record['kl']:.5f}")
        for title, key in (("NLL of the completion", "nll"), ("perplexity", "perplexity")):
            table.add_row(title, *(f"{record[key][name]:.4f}" for name in ("base", "reference", "compact")))
        console.print(table)
        say = f"KL at the 99th percentile {record['kl_p99']:.4f}"
        say += f", hidden states off by {record['hidden_error']:.1%} of the effect"
        if record["generation"]:
            generation = record["generation"]
            say += f", {generation['rows']} greedy texts: {generation['exact_match']:.0%} equal"
            say += f", ROUGE-L {generation['rouge_l']:.3f}"
        console.print(say)
        console.print(intervals(record))
    if record["tasks"]:
        table = Table("task", "metric", title_justify="left")
        for column in ("items", "base", "reference", "compact", "compact − reference, 95 %"):
            table.add_column(column, justify="right")
        for name, task in record["tasks"].items():
            low, high = task["difference_ci95"]
            scores = [f"{task[key]:.4f}" for key in ("base", "reference", "compact")]
            few = " (too few items)" if too_few(task["items"]) else ""
            table.add_row(name, task["metric"], str(task["items"]), *scores, f"{low:+.4f} to {high:+.4f}{few}")
        console.print(table)
    console.print(" ".join(behaviour(record)), style="bold")
    if where is not None:
        console.print(f"Written to {where}")
