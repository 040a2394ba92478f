"""`analyze`: is there anything to share?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.options import Command, given, out_option, takes
from bslora_convert.cli.verb import Output, verb
from bslora_convert.recipe.analyzing import AnalyzeOptions


@click.command(cls=Command)
@click.argument("lora_dir", type=click.Path(path_type=Path))
@out_option("analysis")
@takes(AnalyzeOptions, verb="analyze")
@verb
def analyze(output: Output, lora_dir: Path, out: Path | None, **options: Any) -> None:
    """Measures what a LoRA's modules and layers have in common, and says what is worth trying.

    \b
    Example:
      bslora-convert analyze ./my-lora --out ./my-analysis
    """
    asked = AnalyzeOptions(**given(options))
    look(
        [lora_dir, *asked.beside],
        out=out,
        overwrite=asked.overwrite,
        files=[asked.prompts],
        base_model=asked.base_model if asked.prompts else None,
    )
    from bslora_convert.verbs.analyze import analyze as run

    with output.bar("analyze") as progress:
        record = run(lora_dir, out, asked, progress=progress)
    from bslora_convert.report import commands

    output.result(record, lambda console: _show(console, record, out), commands.after_analyze(record))


def _show(console: Any, record: Mapping[str, Any], out: Path | None) -> None:
    from rich.table import Table

    console.print(" ".join(record["recommendation"]), style="bold")
    if record["shared_energy"]:
        table = Table(title="what one shared factor explains", title_justify="left")
        for column in ("transform", "shared"):
            table.add_column(column)
        for column in ("rank", "energy", "by chance", "z"):
            table.add_column(column, justify="right")
        for transform, levels in record["shared_energy"].items():
            for level, row in levels.items():
                where = "one per layer" if level == "intra" else "one for all"
                cells = (str(row["rank"]), f"{row['energy']:.2%}", f"{row['null_mean']:.2%}", f"{row['z']:.1f}")
                table.add_row(transform, where, *cells)
        console.print(table)
    if record["subspaces_across"]:
        table = Table(title="subspaces across layers", title_justify="left")
        for column in ("kind", "side"):
            table.add_column(column)
        for column in ("mean cos²", "mean z", "CKA"):
            table.add_column(column, justify="right")
        for row in record["subspaces_across"]:
            table.add_row(row["kind"], row["side"], f"{row['overlap']:.4f}", f"{row['z']:.1f}", f"{row['cka']:.4f}")
        console.print(table)
    if out is not None:
        console.print(f"Written to {out}", style="dim")
