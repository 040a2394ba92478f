"""`batch`: a whole library of adapters; `capacity`: how many of them fit a GPU."""

import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.chosen import chosen, given
from bslora_convert.cli.compress import recipe_options
from bslora_convert.cli.early import look
from bslora_convert.cli.finetune import training_options
from bslora_convert.cli.pushing import look_at_push, push_line, push_options, pushed
from bslora_convert.cli.sections import Sectioned
from bslora_convert.cli.verb import Output, verb

SHOWN = 5  # bad adapters whose reasons are printed


class Shard(click.ParamType[tuple[int, int]]):
    """I/N."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        """`2/8` -> (2, 8)."""
        if isinstance(value, tuple):
            return value
        try:
            index, count = (int(part) for part in value.split("/"))
        except ValueError:
            self.fail(f"{value!r} is not I/N, such as 2/8", param, ctx)
        return index, count


@click.command(cls=Sectioned)
@click.argument("library")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@recipe_options
@training_options
@click.option("--workers", type=int, help="Processes, one thread each; 0 = in this one.  [default: the cores]")
@click.option(
    "--engine", type=click.Choice(("local", "ray")), default="local", show_default=True, help="Where jobs run."
)
@click.option("--shard", type=Shard(), default="1/1", show_default=True, help="Only the I-th of N parts, from 1.")
@click.option(
    "--resume/--no-resume", default=True, show_default=True, help="Skip what is done for the same source and recipe."
)
@click.option("--retry-failed", is_flag=True, help="Try bad input of an earlier run again.")
@click.option("--fail-fast", is_flag=True, help="Stop at the first failure.")
@click.option("--max-failures", type=int, help="Stop after this many failures.")
@click.option(
    "--report-html/--no-report-html", default=True, show_default=True, help="report.html beside each adapter."
)
@click.option("--overwrite", is_flag=True, help="Replace finished results of another recipe in OUT.")
@click.option("--dry-run", is_flag=True, help="Check every header and say what would be done.")
@push_options
@verb
def batch(
    output: Output,
    library: str,
    out: Path | None,
    workers: int | None,
    dry_run: bool,
    push: str | None,
    push_dry_run: bool,
    **options: Any,
) -> None:
    """Converts a library of adapters: a directory tree, a manifest (JSONL, CSV) or an fsspec URL.

    OUT is new, empty or batch's own. One bad adapter never stops the rest. The same command again goes on where an
    interrupted one stopped, and so does `batch OUT --resume`: OUT keeps what it was made with.

    \b
    Example:
      bslora-convert batch ./adapters ./compact --transform auto --budget 0.25 --workers 4
      bslora-convert batch s3://bucket/adapters ./compact --shard 3/16
      bslora-convert batch ./compact --resume
    """
    look_at_push(push, push_dry_run)
    if "://" not in library:
        look([library])
    from bslora_convert.verbs.batch import batch as run
    from bslora_convert.verbs.batch import is_failed
    from bslora_convert.verbs.batch import resume as go_on

    where = {
        name: options.pop(name) for name in ("engine", "shard", "resume", "retry_failed", "fail_fast", "max_failures")
    } | {"workers": os.cpu_count() or 1 if workers is None else workers, "dry_run": dry_run}
    said = given()
    if out is None:
        _check_resuming(said, options)
        out = Path(library)
        run = partial(go_on, out, **where)
    else:
        run = partial(run, library, out, **_new(options), **where)
    try:
        with output.bar("batch") as progress:
            summary: dict[str, Any] = {**run(progress=progress)}
            if not dry_run:
                summary |= pushed(out, push, push_dry_run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; what is done stays in {out}, and the same command goes on from there"
        ) from None
    if "resume" in said and not summary.get("skipped", summary.get("done")):
        output.notes([f"{out} held nothing that was done: it was begun anew"])
    from bslora_convert.report import commands

    following = commands.after_batch(summary, str(out)) if "run" in summary else None
    output.result(summary, lambda console: _show(console, summary, out), following)
    if summary.get("bad") if dry_run else is_failed(summary):
        sys.exit(1)


def _check_resuming(said: set[str], options: dict[str, Any]) -> None:
    """With OUT alone its own recipe goes on, and nothing else can be asked for.

    :raises click.UsageError: when OUT was forgotten, or an option of the recipe is given.
    """
    if "resume" not in said:
        raise click.UsageError("Missing argument 'OUT' (with `batch OUT --resume` an earlier run goes on).")
    for name in sorted(said & set(options)):
        raise click.UsageError(
            f"--{name.replace('_', '-')} with OUT alone: OUT keeps what it was made with; leave the option out, or give LIBRARY "
            "and OUT and --overwrite"
        )


def _new(options: dict[str, Any]) -> dict[str, Any]:
    """What a run is to be made with, as `batch` takes it."""
    own = {name: options.pop(name) for name in ("report_html", "overwrite")}
    recipe, training = chosen(options, options.pop("recipe_file"))
    evidence = recipe.evidence
    return {"recipe": recipe, "training": training if evidence.base_model else None, **own}


def _show(console: Any, summary: dict[str, Any], out: Path) -> None:
    from bslora_convert.library.manifest import read_manifest

    def say(text: str, **style: Any) -> None:
        console.print(text, **style)

    if "dry_run" in summary:
        say(
            f"{summary['items']} adapters, {summary['to_convert']} to convert ({summary['bytes'] / 1e6:,.1f} MB), "
            f"{summary['duplicates']} copies of them, {summary['done']} done, {len(summary['bad'])} bad"
        )
        for row in summary["bad"]:
            say(f"{row['id']}: {row['message']}", style="yellow")
        return
    say(
        f"{summary['items']} adapters: {summary['ok']} converted, {summary['skipped']} done before, {summary['failed']} failed, "
        f"{summary['refused']} refused, {summary['pending']} to be done",
        style="bold",
    )
    bad = [row for row in read_manifest(out) if row["status"] in ("failed", "refused")]
    for row in bad[:SHOWN]:
        say(f"{row['id']}: {row['message']}", style="yellow")
    if len(bad) > SHOWN:
        say(f"and {len(bad) - SHOWN} more, with their reasons in {out / 'report.html'}", style="yellow")
    if summary["byte_ratio"] is not None:
        error = summary["relative_error"]
        say(
            f"{summary['bytes_before'] / 1e6:,.1f} MB to {summary['bytes_after'] / 1e6:,.1f} MB ({summary['byte_ratio']:.2%}), "
            f"relative error {error['p50']:.4f} in the median, {error['max']:.4f} at most"
        )
    if "serving" in summary:
        say(summary["serving"]["words"])
        if summary["serving"]["warning"] is not None:
            say(summary["serving"]["warning"], style="yellow")
    if summary["adapters_per_second"]:
        say(f"{summary['adapters_per_second']:.2f} adapters a second")
    say(f"manifest.jsonl, summary.json and report.html are in {out}", style="dim")
    if (line := push_line(summary)) is not None:
        say(line)


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--gpu-gib", type=float, required=True, help="Memory of the GPU.")
@click.option("--base-gib", type=float, required=True, help="What the base model and its cache take of it.")
@verb
def capacity(output: Output, out: Path, gpu_gib: float, base_gib: float) -> None:
    """Says how many adapters of a converted library, a directory or a URL, fit beside the base model, as LoRA and as compact.

    \b
    Example:
      bslora-convert capacity ./compact --gpu-gib 80 --base-gib 20
    """
    from bslora_convert.library.manifest import read_manifest
    from bslora_convert.verbs.capacity import capacity as run

    result = run(read_manifest(out), gpu_gib, base_gib)
    from bslora_convert.report import commands

    output.result(result, lambda console: _show_capacity(console, result), commands.after_capacity(str(out)))


def _show_capacity(console: Any, result: Mapping[str, Any]) -> None:
    from rich.table import Table

    from bslora_convert.library.serving import GIB

    table = Table(title=f"adapters in {result['gpu_gib'] - result['base_gib']:g} GiB", title_justify="left")
    table.add_column("engine")
    for column in ("as LoRA", "as compact"):
        table.add_column(column, justify="right")
    slots, paged = result["slots"], result["paged"]
    table.add_row(
        "reserves slots by rank (vLLM)",
        *(f"{slots[kind]['adapters']:,} of rank {slots[kind]['slot_rank']}" for kind in ("lora", "compact")),
    )
    table.add_row("keeps an adapter's own numbers", *(f"{paged[kind]['adapters']:,}" for kind in ("lora", "compact")))
    resident = result["resident"]
    name = "keeps codes as codes (PEFT with bslora_convert.peft)"
    table.add_row(name, "", f"{resident['adapters']:,}")
    console.print(table)
    if resident["decoded_bytes"]:
        console.print(f"In the last row {resident['decoded_bytes'] / GIB:g} GiB are left to adapters that are decoded.")
