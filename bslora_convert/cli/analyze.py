"""`analyze`: is there anything to share?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.scaling import scaling_options
from bslora_convert.cli.verb import Output, verb


@click.command()
@click.argument("lora_dir", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="Directory for analysis.json, analysis.html and the plots."
)
@click.option(
    "--beside", type=click.Path(path_type=Path), multiple=True, help="Another LoRA whose A are compared; repeatable."
)
@click.option("--base-model", help="Directory of the base model, or its name on the hub: adds activations.")
@click.option(
    "--prompts", type=click.Path(path_type=Path), help="JSONL file of prompts for the activations, gzip accepted."
)
@click.option("--limit", type=int, help="First N rows.")
@click.option("--draws", type=int, default=8, show_default=True, help="Random adapters behind each z-score.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the random adapters.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier result in --out.")
@scaling_options
@verb
def analyze(output: Output, lora_dir: Path, **options: Any) -> None:
    """Measures what a LoRA's modules and layers have in common, and says what is worth trying.

    \b
    Example:
      bslora-convert analyze ./my-lora --out ./my-analysis
    """
    look(
        [lora_dir, *options["beside"]],
        out=options["out"],
        overwrite=options["overwrite"],
        files=[options["prompts"]],
        base_model=options["base_model"] if options["prompts"] else None,
    )
    from bslora_convert.verbs.analyze import analyze as run

    with output.bar("analyze") as progress:
        record = run(lora_dir, progress=progress, **options)
    from bslora_convert.report import commands

    output.result(record, lambda console: _show(console, record, options["out"]), commands.after_analyze(record))


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
