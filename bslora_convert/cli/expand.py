"""`expand`: a compact adapter back as a standard PEFT LoRA, or in the BSLoRA authors' layout."""

from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.verb import Output, accept_changed_option, verb
from bslora_convert.recipe.storage import DTYPES, FORMATS


class Rank(click.ParamType[int | str]):
    """A rank or the word uniform."""

    name = "N|uniform"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Parses a positive whole number or `uniform`."""
        if value == "uniform":
            return "uniform"
        try:
            rank = int(value)
        except ValueError:
            rank = 0
        if rank < 1:
            self.fail(f"{value!r} is neither a positive whole number nor uniform", param, ctx)
        return rank


@click.command()
@click.argument("compact_dir", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@click.option(
    "--rank",
    type=Rank(),
    metavar="N|uniform",
    help="Re-truncate to at most N, or pad every module to the largest rank.",
)
@click.option("--base-model", help="Sets base_model_name_or_path, as some servers compare it letter by letter.")
@click.option(
    "--dtype", type=click.Choice(DTYPES), default="auto", show_default=True, help="Storage; auto = as the source."
)
@click.option(
    "--format",
    type=click.Choice(FORMATS),
    default="lora",
    show_default=True,
    help="lora, or official for the layout of the BSLoRA authors' code.",
)
@accept_changed_option
@click.option("--overwrite", is_flag=True, help="Replace an earlier result in OUT_DIR.")
@verb
def expand(output: Output, compact_dir: Path, out_dir: Path, **options: Any) -> None:
    """Writes a compact adapter back as a standard PEFT LoRA.

    All scaling is in B and lora_alpha equals r. Engines that divide by a tensor's own rank, or that take one rank only,
    compute the same update of what --rank uniform writes. COMPACT_DIR may also be in the BSLoRA authors' layout, which
    --format official writes.

    \b
    Example:
      bslora-convert expand ./my-lora-compact ./my-lora-again
      bslora-convert expand ./my-lora-compact ./for-server --rank 8 --base-model my-org/my-model
      bslora-convert expand ./my-lora-compact ./as-the-authors --format official
    """
    look([compact_dir], out=out_dir, overwrite=options["overwrite"])
    from bslora_convert.verbs.expand import expand as run

    with output.bar("expand"):
        result = run(compact_dir, out_dir, **options)
    output.notes(result["notes"])
    output.result(result, lambda console: _show(console, result, out_dir))


def _show(console: Any, result: dict[str, Any], out_dir: Path) -> None:
    ranks = result["ranks"]
    if result["format"] == "official":
        rank = f"ranks {ranks['local']},{ranks['intra']},{ranks['inter']}"
    else:
        rank = f"rank {ranks['max']}" if ranks["min"] == ranks["max"] else f"ranks {ranks['min']} to {ranks['max']}"
    console.print(
        f"{result['modules']} modules, {rank}, {result['parameters']:,} parameters, {result['bytes']:,} bytes "
        f"({result['dtype']}). Error against the compact form {result['relative_error']:.2e}. Written to {out_dir}",
        soft_wrap=True,
    )
