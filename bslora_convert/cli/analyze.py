"""`analyze`: is there anything to share?"""

from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.options import Command, given, out_option, takes
from bslora_convert.cli.screen import table
from bslora_convert.cli.verb import Output, verb
from bslora_convert.recipe.analyzing import AnalyzeOptions
from bslora_convert.results.analysis import Analysis


@click.command(cls=Command)
@click.argument("lora_dir", type=click.Path(path_type=Path))
@out_option("analysis")
@takes(AnalyzeOptions, verb="analyze")
@verb
def analyze(output: Output, lora_dir: Path, out: Path | None, **options: Any) -> None:
    """Measures what a LoRA's modules have in common, and says what is worth trying.

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


def _show(console: Any, record: Analysis, out: Path | None) -> None:
    console.print(" ".join(record.recommendation), style="bold")
    if record.shared_energy:
        shared = table(["transform", "shared"], ["rank", "energy", "by chance", "z"], "what one shared factor explains")
        for transform, levels in record.shared_energy.items():
            for level, row in levels.items():
                where = "one per layer" if level == "intra" else "one for all"
                cells = (str(row["rank"]), f"{row['energy']:.2%}", f"{row['null_mean']:.2%}", f"{row['z']:.1f}")
                shared.add_row(transform, where, *cells)
        console.print(shared)
    if record.subspaces_across:
        across = table(["kind", "side"], ["mean cos²", "mean z", "CKA"], "subspaces across layers")
        for row in record.subspaces_across:
            across.add_row(row["kind"], row["side"], f"{row['overlap']:.4f}", f"{row['z']:.1f}", f"{row['cka']:.4f}")
        console.print(across)
    if out is not None:
        console.print(f"Written to {out}", style="dim")
