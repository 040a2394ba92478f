"""`inspect`: what an adapter holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.options import Command, given, takes
from bslora_convert.cli.verb import Output, verb
from bslora_convert.recipe.scaling import Scaling

INTEGRITY = {
    "as written": "The weights are what was written and measured.",
    "changed": "The weights are NOT what was written and measured: damaged, or saved again. Readers refuse them "
    "without --accept-changed.",
    "no record": "No record says what was written and measured, so the weights can't be checked.",
}


@click.command(cls=Command)
@click.argument("directory", type=click.Path(path_type=Path))
@takes(Scaling, verb="inspect")
@verb
def inspect(output: Output, directory: Path, **scaling: Any) -> None:
    """Says what an adapter holds, where its bytes are and whether it can be converted.

    \b
    Example:
      bslora-convert inspect ./my-lora
    """
    look([directory])
    from bslora_convert.verbs.inspect import inspect as run

    result = run(directory, **given(scaling))
    output.notes(result["notes"])
    from bslora_convert.report import commands

    following = commands.after_inspect(result, str(directory))
    output.result(result, lambda console: _show(console, result, directory), following)


def _show(console: Any, result: Mapping[str, Any], directory: Path) -> None:
    from rich.table import Table

    def say(text: str, **style: Any) -> None:
        console.print(text, **style)

    ranks = result["ranks"]
    rank = "local rank" if result["kind"] == "bslora" else "rank"
    say(f"{directory}: {result['kind']} adapter for {result['base_model'] or 'an unnamed base model'}", style="bold")
    say(
        f"{result['modules']} modules, {result['parameters']:,} parameters, {result['bytes']:,} bytes, "
        f"{rank} {ranks['min']} to {ranks['max']}, expanded rank {result['expanded_rank']}"
    )
    if "stored_parameters" in result:
        say(f"The file holds {result['stored_parameters']:,} numbers: every module has its own copy of what is shared.")
    if result["convertible"]:
        say("Can be converted.", style="green")
    else:
        for reason in result["reasons"]:
            say(f"Can't be converted: {reason}", style="yellow")
    bytes_table = Table("where the bytes are", title_justify="left")
    bytes_table.add_column("bytes", justify="right")
    bytes_table.add_column("share", justify="right")
    for part, count in sorted(result["bytes_by_part"].items(), key=lambda item: -item[1]):
        bytes_table.add_row(part, f"{count:,}", f"{count / result['bytes']:.1%}")
    console.print(bytes_table)
    spectra = {row["kind"]: row for row in result.get("spectra", [])}
    if "kinds" in result:
        kinds = Table()
        kinds.add_column("kind", no_wrap=True)
        for column in ("modules", "out×in", rank):
            kinds.add_column(column)
        for column in ("stable rank", "energy at r/2", "at r/4") if spectra else ():
            kinds.add_column(column, justify="right")
        for row in result["kinds"]:
            low, high = row["ranks"]["min"], row["ranks"]["max"]
            seen = spectra.get(row["kind"])
            kinds.add_row(
                row["kind"],
                str(row["modules"]),
                ", ".join(f"{out}×{width}" for out, width in row["shapes"]),
                str(low) if low == high else f"{low}–{high}",
                *(
                    (
                        f"{seen['stable_rank']:.2f}",
                        f"{seen['energy_at_half_rank']:.1%}",
                        f"{seen['energy_at_quarter_rank']:.1%}",
                    )
                    if seen
                    else ("", "", "")[: 3 if spectra else 0]
                ),
            )
        console.print(kinds)
    if result.get("sizes"):
        sizes = Table()
        for column, justify in (
            ("asked for", "left"),
            ("bytes", "right"),
            ("share", "right"),
            ("relative error", "right"),
        ):
            sizes.add_column(column, justify=justify)  # type: ignore[arg-type]
        for row in result["sizes"]:
            sizes.add_row(f"{row['option']} {row['value']:g}", f"{row['bytes']:,}", f"{row['byte_ratio']:.1%}",
                          f"{row['relative_error']:.3f}")  # fmt: skip
        say("What a size would cost in codes, forecast from the spectra:")
        console.print(sizes)
        say(f"For instance: {result['sizes'][1]['command']}")
    if "integrity" in result:
        say(INTEGRITY[result["integrity"]], style="yellow" if result["integrity"] == "changed" else "")
    if result["slot_bytes"]:
        step, count = next(iter(result["slot_bytes"].items()))
        say(
            f"A server needs --max-lora-rank {step} or more: {count:,} bytes of 16-bit slot per adapter at {step}. "
            "Slots are reserved by rank, so a smaller file saves GPU memory only below the next step."
        )
