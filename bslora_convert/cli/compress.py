"""`compress`: one LoRA adapter into BSLoRA form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.finetune import goes_on, show_training
from bslora_convert.cli.options import Command, chosen, overwrite_option, recipe_file_option, report_option, takes
from bslora_convert.cli.pushing import look_at_push, push_line, push_options, pushed
from bslora_convert.cli.verb import Output, verb
from bslora_convert.errors import ThresholdMissed
from bslora_convert.recipe.recipe import PARTS, Recipe
from bslora_convert.recipe.training import Training


@click.command(cls=Command)
@click.argument("lora_dir", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@takes(*PARTS.values(), Recipe, Training, verb="compress")
@recipe_file_option
@report_option
@overwrite_option
@push_options
@verb
def compress(
    output: Output,
    lora_dir: Path,
    out_dir: Path,
    recipe_file: Path | None,
    report_html: bool,
    overwrite: bool,
    push: str | None,
    push_dry_run: bool,
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
    recipe, training, _ = chosen(options, recipe_file)
    files = recipe.calibration.files.values()
    look_at_push(push, push_dry_run)
    look([lora_dir], out=out_dir, overwrite=overwrite, files=files, base_model=recipe.calibration.base_model)
    from bslora_convert.verbs.compress import compress as run

    with goes_on(out_dir, resumable=False), output.bar("compress") as progress:
        written = run(
            lora_dir,
            out_dir,
            recipe,
            training=training,
            overwrite=overwrite,
            report_html=report_html,
            progress=progress,
        )
        record = {**written, **pushed(out_dir, push, push_dry_run)}
    output.notes(record["notes"])
    from bslora_convert.report import commands
    from bslora_convert.report.verdict import without_gain

    reason = without_gain(record)
    following = commands.after_compress(record, str(out_dir)) if reason is None else None
    output.result(record, lambda console: _show(console, record, out_dir), following)
    if reason is not None:
        raise ThresholdMissed(f"{reason} ({out_dir} was written all the same)")


def _show(console: Any, record: Mapping[str, Any], out_dir: Path) -> None:
    from rich.table import Table

    from bslora_convert.report.verdict import evidence, is_unbiased, rival_error, sentences

    source, compact, baselines = record["source"], record["compact"], record["baselines"]
    console.print(f"{compact['transform']} of {source['path']}", style="italic", soft_wrap=True)
    table = Table()
    table.add_column("")
    for column in ("parameters", "share", "bytes", "relative error"):
        table.add_column(column, justify="right")
    table.add_row(
        "source, every copy" if "deduplication" in record else "source LoRA",
        f"{source['parameters']:,}",
        "100.00%",
        f"{source['bytes']:,}",
        "0",
    )
    table.add_row(
        "this result, as written",
        f"{compact['parameters']:,}",
        f"{compact['parameter_ratio']:.2%}",
        f"{compact['bytes']:,}",
        f"{record['weight']['relative_error']:.4f}",
        style="bold",
    )
    for name, title in (("svd_adaptive", "SVD, a rank per module"), ("svd_uniform", "SVD, one rank")):
        ratio = baselines[name]["parameter_ratio"]
        table.add_row(
            f"{title}, unbiased" if is_unbiased(record) else title,
            f"{round(ratio * source['parameters']):,}",
            f"{ratio:.2%}",
            "",
            f"{rival_error(record, name):.4f}",
        )
    console.print(table)
    for sentence in sentences(record):
        console.print(sentence)
    if "evidence" in record:
        console.print(" ".join(evidence(record["evidence"])))
    if "training" in record:
        show_training(console, record["training"])
    ranks = compact["ranks"]
    local = (
        ranks["local"]
        if isinstance(ranks["local"], int)
        else f"{min(ranks['local'].values())}–{max(ranks['local'].values())}"
    )
    console.print(
        f"Ranks: local {local}, intra {ranks['intra']}, inter {ranks['inter']}; expanded {compact['expanded_rank']}. "
        f"{record['seconds']['total']:.1f} s. Written to {out_dir}",
        style="dim",
    )
    if (line := push_line(record)) is not None:
        console.print(line)
