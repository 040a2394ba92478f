"""`finetune`: distils a compact adapter against the LoRA that it came from."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.options import Command, Flag, given, recipe_file_option, takes
from bslora_convert.cli.verb import Output, verb
from bslora_convert.recipe.files import read_options
from bslora_convert.recipe.finetuning import FinetuneOptions
from bslora_convert.recipe.options import WHOM, options_of
from bslora_convert.recipe.training import Training
from bslora_convert.results.adapter import Fidelity, TrainingRecord


@click.command(cls=Command)
@click.argument("compact_dir", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    required=True,
    cls=Flag,
    section=WHOM,
    help="Name the LoRA that it came from.",
)
@click.option(
    "--base-model",
    required=True,
    metavar="MODEL",
    cls=Flag,
    section=WHOM,
    help="Run this base model, a directory or a hub name.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    cls=Flag,
    section=WHOM,
    help="Train on these JSONL rows.",
)
@takes(Training, FinetuneOptions, verb="finetune")
@recipe_file_option
@verb
def finetune(
    output: Output,
    compact_dir: Path,
    out_dir: Path,
    reference: Path,
    base_model: str,
    prompts: Path,
    recipe_file: Path | None,
    **options: Any,
) -> None:
    """Distils a compact adapter against the LoRA that it came from.

    The state with the lowest KL on held-out rows is kept, the starting one included: it never ends worse than it began.

    \b
    Example:
      bslora-convert finetune ./my-compact ./my-tuned --reference ./my-lora --base-model ./base \\
        --prompts train.jsonl --max-minutes 10
    """
    training, asked = _asked(given(options), recipe_file)
    held = None if isinstance(asked.heldout, int | float) else asked.heldout
    look([compact_dir, reference], out=out_dir, overwrite=asked.overwrite, files=[prompts, held], base_model=base_model)
    from bslora_convert.verbs.finetune import finetune as run

    with goes_on(out_dir, resumable=True), output.bar("finetune") as progress:
        record = run(compact_dir, out_dir, reference, base_model, prompts, training, asked, progress=progress)
    output.notes(record.notes)
    from bslora_convert.report import commands

    output.result(record, lambda console: _show(console, record, out_dir), commands.verify(str(out_dir)))


def _asked(said: dict[str, Any], file: Path | None) -> tuple[Training, FinetuneOptions]:
    """What the command line and a recipe's file ask for; of the file what concerns a training, and the device."""
    values = read_options(file) if file is not None else {}
    own = {name: said.pop(name) for name in options_of(FinetuneOptions) if name in said}
    device = {"device": values["device"]} if "device" in values else {}
    settings = {name: values[name] for name in options_of(Training) if name in values}
    return Training(**{**settings, **said}), FinetuneOptions(**{**device, **own})


@contextmanager
def goes_on(out: Path, *, resumable: bool) -> Iterator[None]:
    """Says of an interrupted run what is kept and how to go on. resumable: whether the verb keeps states of a training."""
    from bslora_convert.behaviour.checkpoints import has_completions, has_state

    try:
        yield
    except KeyboardInterrupt:
        if resumable and has_state(out):
            kept, how = "the state after the last evaluation is", "the same command with --resume goes on"
        elif has_completions(out):
            kept, how = "the completions that were written are", "the same command goes on"
        else:
            raise
        raise KeyboardInterrupt(f"interrupted; {out} was not written, {kept} kept beside it: {how}") from None


def _show(console: Any, record: Fidelity, out_dir: Path) -> None:
    if record.training is not None:
        show_training(console, record.training)
    console.print(
        f"{record.compact.parameter_ratio:.2%} of the parameters, relative error of the weights "
        f"{record.weight.relative_error:.4f}. Written to {out_dir}",
        style="dim",
    )


def show_training(console: Any, training: TrainingRecord) -> None:
    """What training did, for a reader."""
    from bslora_convert.report.verdict import trained

    console.print(" ".join(trained(training)), style="bold")
    console.print(
        f"{training.training_rows} rows, {training.steps} steps at {training.tokens_per_second:,.0f} tokens/s, "
        f"{training.peak_bytes / 1e9:.2f} GB at the peak.",
    )
