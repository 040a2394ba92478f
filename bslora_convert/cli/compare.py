"""`compare`: every known form at one size."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.scaling import scaling_options
from bslora_convert.cli.verb import Output, verb
from bslora_convert.recipe.storage import DTYPES


class Names(click.ParamType[tuple[str, ...]]):
    """Words between commas."""

    name = "A,B,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """`a,b` -> ("a", "b")."""
        return value if isinstance(value, tuple) else tuple(word for word in value.split(",") if word)


class Shares(click.ParamType[tuple[float, ...]]):
    """Numbers between commas."""

    name = "F,F,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """`0.5,0.25` -> (0.5, 0.25)."""
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(word) for word in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: numbers between commas are expected, such as 0.5,0.25", param, ctx)


@click.command()
@click.argument("lora_dir", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory for comparison.json, comparison.html and the plots."
)
@click.option(
    "--budgets",
    type=Shares(),
    default="0.5,0.25,0.125",
    show_default=True,
    help="Shares of the LoRA's bytes.",
)
@click.option("--forms", type=Names(), default="", help="Only these forms.  [default: all]")
@click.option("--base-model", help="Directory of the base model, or its name on the hub: adds behaviour.")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL file of prompts, gzip accepted.")
@click.option("--limit", type=int, help="First N rows.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Rows at once.")
@click.option("--save", is_flag=True, help="Write each form into --out as an adapter that PEFT loads.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Storage; auto = as the source."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same result.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier result in --out.")
@scaling_options
@verb
def compare(output: Output, lora_dir: Path, **options: Any) -> None:
    """Fits every known form to a LoRA at equal size and prints the table.

    \b
    Example:
      bslora-convert compare ./my-lora --budgets 0.25,0.125 --out ./my-comparison
    """
    look(
        [lora_dir],
        out=options["out"],
        overwrite=options["overwrite"],
        files=[options["prompts"]],
        base_model=options["base_model"] if options["prompts"] else None,
    )
    from bslora_convert.verbs.compare import compare as run

    with output.bar("compare") as progress:
        record = run(lora_dir, progress=progress, **options)
    output.result(record, lambda console: _show(console, record, options["out"]))


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
