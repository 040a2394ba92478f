"""`inspect`: what an adapter holds."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.options import Command, Flag, given, takes
from bslora_convert.cli.screen import table
from bslora_convert.cli.verb import Output, verb
from bslora_convert.recipe.options import LIBRARY
from bslora_convert.recipe.reading import Reading
from bslora_convert.results.adapter import Inspection
from bslora_convert.results.library import LibraryInspection

SHOWN = 40  # tenants of a table
INTEGRITY = {
    "as written": "The weights are what was written and measured.",
    "changed": "The weights are NOT what was written and measured: damaged, or saved again. Readers refuse them "
    "without --accept-changed.",
    "checked": "The weights are what their header has the checksum of; no fidelity.json says how they were measured.",
    "no record": "No fidelity.json and no checksum in the header: the weights can't be checked.",
}


@click.command(cls=Command)
@click.argument("directory", type=click.Path(path_type=Path))
@takes(Reading, verb="inspect")
@click.option(
    "--base-model",
    metavar="MODEL",
    cls=Flag,
    section=LIBRARY,
    help="Of a library, say whom a vLLM that serves this base would refuse, and why.",
)
@click.option("--max-lora-rank", type=int, cls=Flag, section=LIBRARY, help="Of that server.")
@verb
def inspect(output: Output, directory: Path, base_model: str | None, max_lora_rank: int | None, **reading: Any) -> None:
    """Says what an adapter holds, where its bytes are and whether it can be converted.

    Of a library it says who its tenants are, what they call their base model, what is damaged, and with --base-model whom a
    server would refuse: then the exit code is 1.

    \b
    Example:
      bslora-convert inspect ./my-lora
      bslora-convert inspect ./compact-library
      bslora-convert inspect ./compact-library --base-model ./base --max-lora-rank 16
    """
    look([directory])
    from bslora_convert.library.manifest import is_library

    if is_library(directory):
        _library(output, directory, base_model, max_lora_rank)
        return
    if base_model is not None or max_lora_rank is not None:
        raise click.UsageError("--base-model and --max-lora-rank ask about a library, and this is an adapter")
    from bslora_convert.verbs.inspect import inspect as run

    result = run(directory, **given(reading))
    output.notes(result.notes)
    from bslora_convert.report import commands

    following = commands.after_inspect(result, str(directory))
    output.result(result, lambda console: _show(console, result, directory), following)


def _library(output: Output, directory: Path, base_model: str | None, max_lora_rank: int | None) -> None:
    """A library; exit code 1 where a server would refuse somebody."""
    from bslora_convert.verbs.inspect_library import inspect_library

    with output.bar("inspect") as progress:
        result = inspect_library(directory, base_model, max_lora_rank, progress=progress)
    output.notes(result.notes)
    output.result(result, lambda console: _show_library(console, result))
    if result.is_failed:
        sys.exit(1)


def _show_library(console: Any, result: LibraryInspection) -> None:
    share = f" ({result.bytes / result.source_bytes:.1%} of the LoRAs)" if result.source_bytes else ""
    console.print(f"{result.library}: {result.adapters} adapters, {result.bytes:,} bytes{share}", style="bold")
    for name, count in result.bases.items():
        console.print(f"  {count:,} for {name}")
    shown = table(["adapter"], ["bytes", "rank", "relative error", "effect kept", "KL", "rows", "measured"])
    for row in result.rows[:SHOWN]:
        cells = (
            (row["expanded_rank"], "{}"), (row["relative_error"], "{:.4f}"), (row["retention"], "{:.2%}"), (row["kl"], "{:.5f}"),
            (row["rows"], "{}"), (row["when"], "{}"),
        )  # fmt: skip
        shown.add_row(
            row["id"], f"{row['bytes']:,}", *("" if value is None else form.format(value) for value, form in cells)
        )
    console.print(shown)
    if len(result.rows) > SHOWN:
        console.print(f"and {len(result.rows) - SHOWN:,} more; --json has all", style="dim")
    if result.serving is not None:
        console.print(result.serving["words"])
    for row in result.rows:
        if row["damage"] is not None:
            console.print(f"Damaged: {row['id']}: {row['damage']}", style="yellow", soft_wrap=True)
    if (server := result.server) is None:
        return
    for one in server.refused:
        console.print(f"Refused: {one['id']}: {one['why']}", style="yellow", soft_wrap=True)
    rank = f" --max-lora-rank {server.max_lora_rank or server.needed_rank}" if server.needed_rank else ""
    console.print(
        f"vLLM on {server.base_model}{rank} would serve {result.adapters - len(server.refused)} of {result.adapters} adapters",
        style="bold",
    )


def _show(console: Any, result: Inspection, directory: Path) -> None:
    rank = "local rank" if result.kind == "bslora" else "rank"
    console.print(
        f"{directory}: {result.kind} adapter for {result.base_model or 'an unnamed base model'}", style="bold"
    )
    console.print(
        f"{result.modules} modules, {result.parameters:,} parameters, {result.bytes:,} bytes, "
        f"{rank} {result.ranks['min']} to {result.ranks['max']}, expanded rank {result.expanded_rank}"
    )
    if result.stored_parameters is not None:
        console.print(
            f"The file holds {result.stored_parameters:,} numbers: every module has its own copy of what is shared."
        )
    if result.convertible:
        console.print("Can be converted.", style="green")
    for reason in result.reasons:
        console.print(f"Can't be converted: {reason}", style="yellow")
    if (known := result.initialisation) is not None:
        offset = f", {known.offset:,} draws on" if known.offset else ""
        console.print(
            f"A is {1 - known.changed:.1%} its random initialisation (seed {known.seed}{offset}, PEFT's order, "
            f"{known.modules} of {result.modules} modules); training changed {known.changed:.1%} of it."
        )
    console.print(_bytes(result))
    if result.kinds is not None:
        console.print(_kinds(result.kinds, result.spectra or [], rank))
    if result.sizes:
        console.print("What a size would cost in codes, forecast from the spectra:")
        console.print(_sizes(result.sizes))
        console.print(f"For instance: {result.sizes[1]['command']}")
    if result.integrity is not None:
        console.print(INTEGRITY[result.integrity], style="yellow" if result.integrity == "changed" else "")
    if result.slot_bytes:
        step, count = next(iter(result.slot_bytes.items()))
        console.print(
            f"A server needs --max-lora-rank {step} or more: {count:,} bytes of 16-bit slot per adapter at {step}. "
            "Slots are reserved by rank, so a smaller file saves GPU memory only below the next step."
        )


def _bytes(result: Inspection) -> Any:
    found = table(["where the bytes are"], ["bytes", "share"])
    for part, count in sorted(result.bytes_by_part.items(), key=lambda item: -item[1]):
        found.add_row(part, f"{count:,}", f"{count / result.bytes:.1%}")
    return found


def _kinds(kinds: Sequence[Mapping[str, Any]], spectra: Sequence[Mapping[str, Any]], rank: str) -> Any:
    """Modules by kind; of a LoRA with what its spectra hold."""
    seen = {row["kind"]: row for row in spectra}
    found = table(["kind", "modules", "out×in", rank], ["stable rank", "energy at r/2", "at r/4"] if seen else [])
    for row in kinds:
        low, high = row["ranks"]["min"], row["ranks"]["max"]
        shapes = ", ".join(f"{out}×{width}" for out, width in row["shapes"])
        cells = [row["kind"], str(row["modules"]), shapes, str(low) if low == high else f"{low}–{high}"]
        if own := seen.get(row["kind"]):
            shares = (own["energy_at_half_rank"], own["energy_at_quarter_rank"])
            cells += [f"{own['stable_rank']:.2f}", *(f"{share:.1%}" for share in shares)]
        found.add_row(*cells)
    return found


def _sizes(sizes: Sequence[Mapping[str, Any]]) -> Any:
    found = table(["asked for"], ["bytes", "share", "relative error"])
    for row in sizes:
        asked = f"{row['option']} {row['value']:g}"
        found.add_row(asked, f"{row['bytes']:,}", f"{row['byte_ratio']:.1%}", f"{row['relative_error']:.3f}")
    return found
