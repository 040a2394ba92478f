"""`compare`: every known form at one size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.options import Command, given, out_option, takes
from bslora_convert.cli.verb import Output, verb
from bslora_convert.recipe.comparing import CompareOptions


@click.command(cls=Command)
@click.argument("lora_dir", type=click.Path(path_type=Path))
@out_option("comparison")
@takes(CompareOptions, verb="compare")
@verb
def compare(output: Output, lora_dir: Path, out: Path | None, **options: Any) -> None:
    """Fits every known form to a LoRA at equal size and prints the table.

    \b
    Example:
      bslora-convert compare ./my-lora --budgets 0.25,0.125 --out ./my-comparison
    """
    asked = CompareOptions(**given(options))
    look(
        [lora_dir],
        out=out,
        overwrite=asked.overwrite,
        files=[asked.prompts],
        base_model=asked.base_model if asked.prompts else None,
    )
    from bslora_convert.verbs.compare import compare as run

    with output.bar("compare") as progress:
        record = run(lora_dir, out, asked, progress=progress)
    output.result(record, lambda console: _show(console, record, out))


def _show(console: Any, record: Mapping[str, Any], out: Path | None) -> None:
    from rich.table import Table

    from bslora_convert.report import commands
    from bslora_convert.report.comparison import ordered

    behaviour = any(row["functional"] for row in record["rows"])
    table = Table()
    table.add_column("asked for", justify="right")
    table.add_column("form", no_wrap=True)
    for column in ("bytes", "error", "gain", *(("KL", "retention") if behaviour else ()), "s"):
        table.add_column(column, justify="right")
    table.add_column("settings and notes", overflow="fold")
    last = None
    for row in ordered(record["rows"]):
        if last is not None and row["budget"] != last:
            table.add_section()
        last = row["budget"]
        settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items())
        note = "; ".join(text for text in (settings, row["note"]) if text)
        measured = (
            (f"{row['functional']['kl']:.5f}", f"{row['functional']['retention']:.2%}")
            if row["functional"]
            else ("", "")
        )
        if row["relative_error"] is None:
            cells = ["–", "–", "–", *(measured if behaviour else ()), ""]
        else:
            cells = [
                f"{row['byte_ratio']:.2%}", f"{row['relative_error']:.4f}", f"{row['gain']:.3f}",
                *(measured if behaviour else ()), f"{row['seconds']:.1f}",
            ]  # fmt: skip
        table.add_row(f"{row['budget']:.2%}", row["form"], *cells, note)
    console.print(table)
    for budget, advice in commands.compress(record).items():
        console.print(f"At {budget:.2%} {advice.form} has the {advice.reason}:")
        console.print(f"  {advice.call}", soft_wrap=True)
    if out is not None:
        console.print(f"Written to {out}", style="dim")
