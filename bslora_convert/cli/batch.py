"""`batch`: a whole library of adapters; `capacity`: how many of them fit a GPU."""

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.options import Command, chosen, given, recipe_file_option, takes
from bslora_convert.cli.screen import show_failed, table
from bslora_convert.cli.verb import Output, verb
from bslora_convert.files.address import MANIFEST
from bslora_convert.files.record import named
from bslora_convert.files.store import is_url
from bslora_convert.recipe.batching import BatchOptions
from bslora_convert.recipe.options import flag_of
from bslora_convert.recipe.recipe import RECIPE_PARTS, Recipe
from bslora_convert.recipe.training import Training
from bslora_convert.results.library import BatchPlan, BatchSummary, Capacity

SHOWN = 5  # bad adapters whose reasons are printed


@click.command(cls=Command)
@click.argument("library")
@click.argument("out", type=click.Path(path_type=Path), required=False)
@takes(*RECIPE_PARTS.values(), Recipe, Training, BatchOptions, verb="compress")
@recipe_file_option
@verb
def batch(
    output: Output,
    library: str,
    out: Path | None,
    recipe_file: Path | None,
    **options: Any,
) -> None:
    """Converts a library: a directory tree, a manifest (JSONL, CSV) or an fsspec URL.

    OUT is new, empty or batch's own. One bad adapter never stops the rest. The same command again goes on where an
    interrupted one stopped, and so does `batch OUT --resume`: OUT keeps what it was made with.

    \b
    Example:
      bslora-convert batch ./adapters ./compact --transform auto --budget 0.25 --workers 4
      bslora-convert batch s3://bucket/adapters ./compact --shard 3/16
      bslora-convert batch ./compact --resume
    """
    if "://" not in library:
        look([library])
    from bslora_convert.verbs.batch import batch as run_batch
    from bslora_convert.verbs.batch import resume as go_on

    recipe, training, said = chosen(options, recipe_file)
    said.setdefault("workers", os.cpu_count() or 1)
    run: Callable[..., BatchSummary | BatchPlan]
    if out is None:
        _check_resuming(said, given(options), recipe_file)
        out = Path(library)
        run = partial(go_on, out)
    else:
        run = partial(run_batch, library, out, recipe, training if recipe.calibration.runs else None)
    try:
        with output.bar("batch") as progress:
            found = run(BatchOptions(**said), progress=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; what is done stays in {out}, and the same command goes on from there"
        ) from None
    if "resume" in said and not (found.skipped if isinstance(found, BatchSummary) else found.done):
        output.notes([f"{out} held nothing that was done: it was begun anew"])
    from bslora_convert.report import commands

    if isinstance(found, BatchSummary):
        shown = partial(_show, summary=found, out=out, pruning=bool(said.get("prune")))
        output.result(found, shown, commands.after_batch(found, str(out)))
    else:
        output.result(found, lambda console: _show_plan(console, found))
    if found.is_failed:
        sys.exit(1)


def _check_resuming(said: dict[str, Any], options: dict[str, Any], recipe_file: Path | None) -> None:
    """With OUT alone its own recipe goes on, and nothing else can be asked for.

    said: how to run. options: all that are on the command line.

    :raises click.UsageError: when OUT was forgotten, or an option of the recipe is given.
    """
    if "resume" not in said:
        raise click.UsageError("Missing argument 'OUT' (with `batch OUT --resume` an earlier run goes on).")
    changing = [
        *({"recipe"} if recipe_file else ()),
        *(set(options) - set(said)),
        *({"report_html", "overwrite"} & set(said)),
    ]
    for name in sorted(changing):
        raise click.UsageError(
            f"{flag_of(name)} with OUT alone: OUT keeps what it was made with; leave the option out, or give LIBRARY "
            "and OUT and --overwrite"
        )


def _show_plan(console: Any, plan: BatchPlan) -> None:
    console.print(
        f"{plan.items} adapters, {plan.to_convert} to convert ({plan.bytes / 1e6:,.1f} MB), {plan.duplicates} copies of them, "
        f"{plan.done} done, {len(plan.bad)} bad"
    )
    _show_left(console, plan.left_over)
    show_failed(console, plan.bad)
    _show_notes(console, plan.notes)


def _show_left(console: Any, names: Sequence[str]) -> None:
    if names:
        console.print(
            f"Left over: {named(names, SHOWN)}. Their source left the library, so they are no tenants; --prune removes them",
            style="yellow",
        )


def _show_notes(console: Any, notes: Sequence[str]) -> None:
    if notes:
        console.print(f"{len(notes)} left out, or linked from elsewhere: {named(notes, SHOWN)}", style="yellow")


def _show(console: Any, summary: BatchSummary, out: Path, pruning: bool) -> None:
    from bslora_convert.library.manifest import read_manifest

    console.print(
        f"{summary.items} adapters: {summary.ok} converted, {summary.skipped} done before, {summary.failed} failed, "
        f"{summary.refused} refused, {summary.pending} to be done",
        style="bold",
    )
    bad = [row for row in read_manifest(out) if row["status"] in ("failed", "refused")]
    show_failed(console, bad[:SHOWN])
    if len(bad) > SHOWN:
        console.print(f"and {len(bad) - SHOWN} more, with their reasons in {out / 'report.html'}", style="yellow")
    if summary.pruned:
        console.print(f"Removed {len(summary.pruned)} whose source left the library: {named(summary.pruned, SHOWN)}")
    if not pruning:  # else notes say of each why it was left
        _show_left(console, summary.left_over)
    _show_notes(console, summary.notes)
    if summary.byte_ratio is not None and summary.relative_error is not None:
        error = summary.relative_error
        console.print(
            f"{summary.bytes_before / 1e6:,.1f} MB to {summary.bytes_after / 1e6:,.1f} MB ({summary.byte_ratio:.2%}), "
            f"relative error {error['p50']:.4f} in the median, {error['max']:.4f} at most"
        )
    if summary.serving is not None:
        console.print(summary.serving["words"])
        if summary.serving["warning"] is not None:
            console.print(summary.serving["warning"], style="yellow")
    if summary.adapters_per_second:
        console.print(f"{summary.adapters_per_second:.2f} adapters a second")
    if (found := summary.behaviour) is not None:
        kept = found.get("retention")
        worst = f", retention {kept['min']:.2%} at least" if kept else ""
        console.print(f"Behaviour was measured of {found['measured']} adapters{worst}")
    from bslora_convert.report import commands

    if (served := commands.serve_library(summary, str(out))) is not None:
        console.print(f"To serve it: {served}", soft_wrap=True)
    console.print(f"manifest.jsonl, summary.json and report.html are in {out}", style="dim")


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--gpu-gib", type=float, required=True, help="Memory of the GPU.")
@click.option("--base-gib", type=float, required=True, help="What the base model and its cache take of it.")
@verb
def capacity(output: Output, out: Path, gpu_gib: float, base_gib: float) -> None:
    """Says how many adapters of a converted library fit beside the base model.

    OUT is the library, a directory or a URL. Adapters are counted as LoRA and as compact.

    \b
    Example:
      bslora-convert capacity ./compact --gpu-gib 80 --base-gib 20
    """
    from bslora_convert.library.manifest import read_manifest, tenants
    from bslora_convert.verbs.capacity import capacity as run

    look([] if is_url(out) else [out])
    manifest_alone = is_url(out) or (out / MANIFEST).is_file()
    rows, notes = (read_manifest(out), []) if manifest_alone else tenants(out)
    output.notes(notes)
    result = run(rows, gpu_gib, base_gib)
    from bslora_convert.report import commands

    output.result(result, lambda console: _show_capacity(console, result), commands.after_capacity(str(out)))


def _show_capacity(console: Any, result: Capacity) -> None:
    from bslora_convert.library.serving import GIB

    shown = table(["engine"], ["as LoRA", "as compact"], f"adapters in {result.gpu_gib - result.base_gib:g} GiB")
    kinds, resident = ("lora", "compact"), result.resident
    slots = (f"{result.slots[kind]['adapters']:,} of rank {result.slots[kind]['slot_rank']}" for kind in kinds)
    shown.add_row("reserves slots by rank (vLLM)", *slots)
    shown.add_row("keeps an adapter's own numbers", *(f"{result.paged[kind]['adapters']:,}" for kind in kinds))
    shown.add_row("keeps codes as codes (PEFT with bslora_convert.peft)", "", f"{resident['adapters']:,}")
    console.print(shown)
    if resident["decoded_bytes"]:
        console.print(f"In the last row {resident['decoded_bytes'] / GIB:g} GiB are left to adapters that are decoded.")
