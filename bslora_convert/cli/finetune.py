"""`finetune`: distils a compact adapter against the LoRA that it came from."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.verb import Output, accept_changed_option, verb
from bslora_convert.recipe.training import OPTIONS, TRAINED, Training


def training_options(function: Any) -> Any:
    """Every option of a `Training` that `compress` takes as well."""
    for option in reversed(
        (
            click.option(
                "--train",
                type=click.Choice(TRAINED),
                default="local",
                show_default=True,
                help="Which parts are trained.",
            ),
            click.option("--max-steps", type=int, help="Steps at most."),
            click.option("--epochs", type=float, default=1.0, show_default=True, help="Passes over the rows at most."),
            click.option("--max-minutes", type=float, help="Minutes at most, everything counted."),
            click.option("--learning-rate", type=float, default=5e-4, show_default=True),
            click.option("--batch-size", type=int, default=8, show_default=True, help="Rows at once."),
            click.option("--accumulate", type=int, default=1, show_default=True, help="Batches a step."),
            click.option(
                "--temperature", type=float, default=1.0, show_default=True, help="Of the softmax in the loss."
            ),
            click.option(
                "--hidden-weight", type=float, default=0.0, show_default=True, help="Of the hidden-state term."
            ),
            click.option("--max-length", type=int, help="Longest row in tokens.  [default: the model's context]"),
            click.option(
                "--evaluate-every", type=int, default=20, show_default=True, help="Steps between evaluations."
            ),
            click.option(
                "--patience", type=int, default=8, show_default=True, help="Evaluations without a better state."
            ),
        )
    ):
        function = option(function)
    return function


@click.command()
@click.argument("compact_dir", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option("--reference", type=click.Path(path_type=Path), required=True, help="The LoRA that it came from.")
@click.option("--base-model", required=True, help="Directory of the base model, or its name on the hub.")
@click.option("--prompts", type=click.Path(path_type=Path), required=True, help="JSONL file of prompts, gzip accepted.")
@click.option(
    "--heldout", default="0.1", show_default=True, help="Share of the rows, or a file, that picks the state kept."
)
@training_options
@click.option("--limit", type=int, help="First N rows.")
@click.option(
    "--max-new-tokens", type=int, default=128, show_default=True, help="Of completions that the reference writes."
)
@click.option("--chat-template/--no-chat-template", default=True, show_default=True, help="Prompts as a user's turn.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="Of the base: auto (float32 on a CPU), float32, bfloat16, float16.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same result on a CPU.")
@click.option("--report-html/--no-report-html", default=True, show_default=True, help="report.html beside the adapter.")
@accept_changed_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier result in OUT_DIR.")
@verb
def finetune(
    output: Output, compact_dir: Path, out_dir: Path, heldout: str, chat_template: bool, seed: int, **options: Any
) -> None:
    """Distils a compact adapter against the LoRA that it came from.

    The state with the lowest KL on held-out rows is kept, the starting one included: it never ends worse than it began.

    \b
    Example:
      bslora-convert finetune ./my-compact ./my-tuned --reference ./my-lora --base-model ./base \\
        --prompts train.jsonl --max-minutes 10
    """
    share, file = _heldout(heldout)
    look(
        [compact_dir, options["reference"]],
        out=out_dir,
        overwrite=options["overwrite"],
        files=[options["prompts"], file],
        base_model=options["base_model"],
    )
    from bslora_convert.verbs.finetune import finetune as run

    settings = {name: options.pop(name) for name in OPTIONS}
    training = Training(**settings, heldout=share, chat_template=chat_template, seed=seed)
    base_model, reference, prompts = (options.pop(name) for name in ("base_model", "reference", "prompts"))
    with goes_on(out_dir, resumable=True), output.bar("finetune") as progress:
        record = run(
            compact_dir,
            out_dir,
            reference,
            base_model,
            prompts,
            training,
            heldout=file,
            progress=progress,
            **options,
        )
    output.notes(record["notes"])
    from bslora_convert.report import commands

    output.result(record, lambda console: _show(console, record, out_dir), commands.verify(str(out_dir)))


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


def _heldout(value: str) -> tuple[float, Path | None]:
    """A share, or a file."""
    try:
        return float(value), None
    except ValueError:
        return 0.1, Path(value)


def _show(console: Any, record: Mapping[str, Any], out_dir: Path) -> None:
    show_training(console, record["training"])
    compact, weight = record["compact"], record["weight"]
    console.print(
        f"{compact['parameter_ratio']:.2%} of the parameters, relative error of the weights {weight['relative_error']:.4f}. "
        f"Written to {out_dir}",
        style="dim",
    )


def show_training(console: Any, training: dict[str, Any]) -> None:
    """What training did, for a reader."""
    from bslora_convert.report.verdict import trained

    console.print(" ".join(trained(training)), style="bold")
    console.print(
        f"{training['training_rows']} rows, {training['steps']} steps at {training['tokens_per_second']:,.0f} tokens/s, "
        f"{training['peak_bytes'] / 1e9:.2f} GB at the peak.",
    )
