"""`compress`: one LoRA adapter into BSLoRA form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.bslora.codes.widths import WIDTHS
from bslora_convert.cli.chosen import chosen
from bslora_convert.cli.early import look
from bslora_convert.cli.finetune import goes_on, show_training, training_options
from bslora_convert.cli.pushing import look_at_push, push_line, push_options, pushed
from bslora_convert.cli.scaling import SCALING
from bslora_convert.cli.sections import Sectioned
from bslora_convert.cli.verb import Output, verb
from bslora_convert.errors import ThresholdMissed
from bslora_convert.recipe.calibration import METRIC_NAMES
from bslora_convert.recipe.storage import DTYPES, GAINS
from bslora_convert.recipe.structure import KERNEL_NAMES, LOCAL_RANKS, TRANSFORM_NAMES, WINDOW_NAMES


class Ranks(click.ParamType[tuple[int, int, int]]):
    """Three whole numbers, as in 2,4,16."""

    name = "L,A,E"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        """Parses the triple."""
        parts = value.split(",") if isinstance(value, str) else value
        try:
            local, intra, inter = (int(part) for part in parts)
        except ValueError:
            self.fail(f"{value!r} is not three whole numbers such as 2,4,16", param, ctx)
        return local, intra, inter


ON_PROMPTS = ""  # the value of --finetune without a file


def recipe_options(function: Any) -> Any:
    """Every option of a `Recipe`."""
    for option in reversed(
        (
            click.option(
                "--transform",
                type=click.Choice(TRANSFORM_NAMES),
                default="auto",
                show_default=True,
                help="How shared factors take a module's shape; none = plain SVD, auto = the best at what is asked.",
            ),
            click.option(
                "--min-retention",
                type=float,
                help="Smallest result that keeps this share of the adapter's effect on rows held out of --prompts.",
            ),
            click.option(
                "--max-kl", type=float, help="Smallest result of at most this KL to the original there, nats a token."
            ),
            click.option(
                "--min-agreement",
                type=float,
                help="Smallest result that predicts the same next token this often there.",
            ),
            click.option(
                "--max-error",
                type=float,
                help="Smallest result of at most this relative error as written, gain and noise together, in codes.  "
                "[default: 0.1]",
            ),
            click.option(
                "--bytes",
                type=float,
                help="Share of the source's file that the result may use: rank and precision chosen together, in codes.",
            ),
            click.option("--budget", type=float, help="Share of the LoRA's parameters to use, 0 < F <= 1, in floats."),
            click.option("--ranks", type=Ranks(), help="Local, intra and inter rank by hand, in floats."),
            click.option(
                "--bits",
                type=click.Choice([str(width) for width in WIDTHS]),
                callback=lambda _, __, value: value and int(value),
                help="One width for every coded number; with --budget or --ranks it codes what they give.",
            ),
            click.option(
                "--max-rank",
                help="Greatest expanded rank of a module: a number, none, or slot: the source's server slot.  "
                "[default: slot; none with --ranks]",
            ),
            click.option(
                "--min-shared",
                type=int,
                help="Least shared ranks of the search.  [default: 1 for ke, gt and ss, 0 for auto]",
            ),
            click.option(
                "--shared-size",
                type=int,
                help="Rows and columns of the shared factors.  [default: ke 256, gt 1024, cut to what divides or fits]",
            ),
            click.option(
                "--slice", type=click.Choice(WINDOW_NAMES), default="center", show_default=True, help="Window of ss."
            ),
            click.option(
                "--kernel", type=click.Choice(KERNEL_NAMES), default="r_1", show_default=True, help="Variant of ke."
            ),
            click.option(
                "--local-ranks",
                type=click.Choice(LOCAL_RANKS),
                help="One local rank for all modules, or ranks where they buy most.  [default: adaptive; uniform with --ranks]",
            ),
            click.option(
                "--groups",
                default="layer",
                show_default=True,
                help="Who shares the intra pairs: layer, auto (clusters) or a JSON file of groups.",
            ),
            click.option(
                "--dtype",
                type=click.Choice(DTYPES),
                default="auto",
                show_default=True,
                help="Storage; auto = as the source.",
            ),
            click.option(
                "--gain",
                type=click.Choice(GAINS),
                default="unbiased",
                show_default=True,
                help="unbiased: each module's update scaled to the original's strength; least-squares: left of least error, "
                "too weak.",
            ),
            click.option("--base-model", help="Directory or hub name of the base model, for --prompts and --finetune."),
            click.option("--prompts", help="JSONL rows: fit in the base model's metric, choose and prove on them."),
            click.option(
                "--metric",
                type=click.Choice(METRIC_NAMES),
                default="auto",
                show_default=True,
                help="Of --prompts: directions of the loss's gradient at the modules' outputs, of what they are fed, both, or "
                "what does best.",
            ),
            click.option(
                "--finetune",
                is_flag=False,
                flag_value=ON_PROMPTS,
                callback=lambda _, __, value: True if value == ON_PROMPTS else value,
                help="Distil against the original after the fit: on a JSONL file, or without one on rows of --prompts.",
            ),
            *SCALING,
            click.option(
                "--recipe",
                "recipe_file",
                type=click.Path(path_type=Path),
                help="Options from a TOML or JSON file, or from an earlier fidelity.json; those given here come first.",
            ),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
            click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same bytes."),
        )
    ):
        function = option(function)
    return function


@click.command(cls=Sectioned)
@click.argument("lora_dir", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@recipe_options
@training_options
@click.option("--report-html/--no-report-html", default=True, show_default=True, help="report.html beside the adapter.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier result in OUT_DIR.")
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
    authors' layout is converted without a fit: every tensor is kept, each once. --train and what follows it say how
    --finetune trains.

    \b
    Example:
      bslora-convert compress ./my-lora ./my-lora-compact
      bslora-convert compress ./my-lora ./shared --transform ke
      bslora-convert compress ./my-lora ./proved --min-retention 0.99 --base-model ./base --prompts rows.jsonl
      bslora-convert compress ./my-lora ./tuned --bytes 0.0625 --base-model ./base --finetune train.jsonl --max-minutes 10
    """
    recipe, training = chosen(options, recipe_file)
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
