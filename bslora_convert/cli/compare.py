"""`compare`: every known form at one size."""

from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.options import Command, given, out_option, takes
from bslora_convert.cli.screen import table
from bslora_convert.cli.verb import Output, verb
from bslora_convert.recipe.comparing import CompareOptions
from bslora_convert.results.analysis import Comparison, FormRow


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


def _show(console: Any, record: Comparison, out: Path | None) -> None:
    from bslora_convert.report import advice
    from bslora_convert.report.comparison import ordered

    measured = ("KL", "retention") if record.has_behaviour else ()
    shown = table([], ["asked for"])
    shown.add_column("form", no_wrap=True)
    for column in ("bytes", "error", "gain", *measured, "s"):
        shown.add_column(column, justify="right")
    shown.add_column("settings and notes", overflow="fold")
    last = None
    for row in ordered(record.rows):
        if last is not None and row.budget != last:
            shown.add_section()
        last = row.budget
        settings = ", ".join(f"{key} {value}" for key, value in row.settings.items())
        note = "; ".join(text for text in (settings, row.note) if text)
        shown.add_row(f"{row.budget:.2%}", row.form, *_cells(row, record.has_behaviour), note)
    console.print(shown)
    for budget, best in advice.compress(record).items():
        console.print(f"At {budget:.2%} {best.form} has the {best.reason}:")
        console.print(f"  {best.call}", soft_wrap=True)
    if out is not None:
        console.print(f"Written to {out}", style="dim")


def _cells(row: FormRow, behaviour: bool) -> list[str]:
    """A form's figures, dashes where it has no fit."""
    done = row.functional
    measured = ([f"{done.kl:.5f}", f"{done.retention:.2%}"] if done else ["", ""]) if behaviour else []
    if row.relative_error is None:
        return ["–", "–", "–", *measured, ""]
    return [f"{row.byte_ratio:.2%}", f"{row.relative_error:.4f}", f"{row.gain:.3f}", *measured, f"{row.seconds:.1f}"]
