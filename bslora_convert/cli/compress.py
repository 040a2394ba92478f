"""`compress`: one LoRA adapter into BSLoRA form."""

from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.finetune import goes_on, show_training
from bslora_convert.cli.options import Command, chosen, recipe_file_option, takes
from bslora_convert.cli.screen import table
from bslora_convert.cli.verb import Output, verb
from bslora_convert.errors import ThresholdMissed
from bslora_convert.recipe.output import OutputOptions
from bslora_convert.recipe.recipe import RECIPE_PARTS, Recipe
from bslora_convert.recipe.training import Training
from bslora_convert.results.adapter import Fidelity


@click.command(cls=Command)
@click.argument("lora_dir", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@takes(*RECIPE_PARTS.values(), Recipe, Training, OutputOptions, verb="compress")
@recipe_file_option
@verb
def compress(
    output: Output,
    lora_dir: Path,
    out_dir: Path,
    recipe_file: Path | None,
    **options: Any,
) -> None:
    """Converts one LoRA adapter into BSLoRA form.

    Writes the compact adapter, fidelity.json, report.html and a model card into OUT_DIR. A directory in the BSLoRA
    authors' layout is converted without a fit: every tensor is kept, each once. What only an expert decides stands in a
    recipe file: `bslora-convert recipe` prints one.

    \b
    Example:
      bslora-convert compress ./my-lora ./my-lora-compact
      bslora-convert compress ./my-lora ./shared --transform ke
      bslora-convert compress ./my-lora ./proved --min-retention 0.99 --base-model ./base --prompts rows.jsonl
      bslora-convert compress ./my-lora ./tuned --bytes 0.0625 --base-model ./base --finetune train.jsonl --max-minutes 10
    """
    recipe, training, rest = chosen(options, recipe_file)
    how = OutputOptions(**rest)
    files = recipe.calibration.files.values()
    look([lora_dir], out=out_dir, overwrite=how.overwrite, files=files, base_model=recipe.calibration.base_model)
    from bslora_convert.verbs.compress import compress as run

    with goes_on(out_dir, resumable=False), output.bar("compress") as progress:
        record = run(
            lora_dir,
            out_dir,
            recipe,
            training=training,
            overwrite=how.overwrite,
            report_html=how.report_html,
            progress=progress,
        )
    output.notes(record.notes)
    from bslora_convert.report import commands
    from bslora_convert.report.verdict import without_gain

    reason = without_gain(record)
    following = commands.after_compress(record, str(out_dir)) if reason is None else None
    output.result(record, lambda console: _show(console, record, out_dir), following)
    if reason is not None:
        raise ThresholdMissed(f"{reason} ({out_dir} was written all the same)")


def _show(console: Any, record: Fidelity, out_dir: Path) -> None:
    from bslora_convert.report.verdict import evidence, sentences

    compact, local = record.compact, record.compact.ranks["local"]
    console.print(f"{compact.transform} of {record.source.path}", style="italic", soft_wrap=True)
    console.print(_sizes(record))
    for sentence in sentences(record):
        console.print(sentence)
    if record.evidence is not None:
        console.print(" ".join(evidence(record.evidence)))
    if record.training is not None:
        show_training(console, record.training)
    shown = local if isinstance(local, int) else f"{min(local.values())}–{max(local.values())}"
    console.print(
        f"Ranks: local {shown}, intra {compact.ranks['intra']}, inter {compact.ranks['inter']}; "
        f"expanded {compact.expanded_rank}. {record.seconds.total:.1f} s. Written to {out_dir}",
        style="dim",
    )


def _sizes(record: Fidelity) -> Any:
    """The result beside its source and plain SVD of its size."""
    from bslora_convert.report.verdict import is_unbiased, rival_error

    source, compact = record.source, record.compact
    found = table([""], ["parameters", "share", "bytes", "relative error"])
    name = "source LoRA" if record.deduplication is None else "source, every copy"
    found.add_row(name, f"{source.parameters:,}", "100.00%", f"{source.bytes:,}", "0")
    sizes = f"{compact.parameters:,}", f"{compact.parameter_ratio:.2%}", f"{compact.bytes:,}"
    found.add_row("this result, as written", *sizes, f"{record.weight.relative_error:.4f}", style="bold")
    for name, title in (("svd_adaptive", "SVD, a rank per module"), ("svd_uniform", "SVD, one rank")):
        ratio = record.baselines[name].parameter_ratio
        shown = f"{title}, unbiased" if is_unbiased(record) else title
        found.add_row(
            shown, f"{round(ratio * source.parameters):,}", f"{ratio:.2%}", "", f"{rival_error(record, name):.4f}"
        )
    return found
