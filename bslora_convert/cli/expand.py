"""`expand`: a compact adapter back as a standard PEFT LoRA, or in the BSLoRA authors' layout."""

import sys
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.verb import Output, accept_changed_option, verb
from bslora_convert.files.address import is_library
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
@click.argument("compact_dir", metavar="COMPACT", type=click.Path(path_type=Path))
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
    compute the same update of what --rank uniform writes. COMPACT may also be in the BSLoRA authors' layout, which
    --format official writes. Of a library that batch made every adapter is written, to OUT_DIR/<id>; one that is broken
    stops no other, and makes the exit code 1.

    \b
    Example:
      bslora-convert expand ./my-lora-compact ./my-lora-again
      bslora-convert expand ./my-lora-compact ./for-server --rank 8 --base-model my-org/my-model
      bslora-convert expand ./my-lora-compact ./as-the-authors --format official
      bslora-convert expand ./compact-library ./for-the-servers
    """
    if is_library(compact_dir):
        _library(output, compact_dir, out_dir, options)
        return
    look([compact_dir], out=out_dir, overwrite=options["overwrite"])
    from bslora_convert.verbs.expand import expand as run

    with output.bar("expand"):
        result = run(compact_dir, out_dir, **options)
    output.notes(result["notes"])
    output.result(result, lambda console: _show(console, result, out_dir))


def _library(output: Output, library: Path, out_dir: Path, options: dict[str, Any]) -> None:
    """Every adapter of a library; exit code 1 where something went wrong with one."""
    if not options["overwrite"]:  # with it, each adapter's own directory is what is looked at
        look([library], out=out_dir)
    from bslora_convert.verbs.expand_library import expand_library

    try:
        with output.bar("expand") as progress:
            result = expand_library(library, out_dir, progress=progress, **options)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the adapters that were written stay in {out_dir}") from None
    output.notes(result["notes"])
    output.result(result, lambda console: _show_library(console, result, out_dir))
    if result["bad"]:
        sys.exit(1)


def _show_library(console: Any, result: dict[str, Any], out_dir: Path) -> None:
    from rich.table import Table

    table = Table()
    table.add_column("adapter", no_wrap=True)
    for column in ("ranks", "parameters", "bytes", "error"):
        table.add_column(column, justify="right")
    good = [row for row in result["rows"] if row["status"] == "ok"]
    for row in good:
        error = f"{row['relative_error']:.2e}"
        table.add_row(row["id"], _ranks(row), f"{row['parameters']:,}", f"{row['bytes']:,}", error)
    if good:
        console.print(table)
    for row in result["rows"]:
        if row["status"] != "ok":
            console.print(f"{row['id']}: {row['message']}", style="yellow", soft_wrap=True)
    rank = f", a server needs rank {result['rank']}" if result["rank"] else ""
    console.print(
        f"{len(good)} of {result['adapters']} adapters, {result['bytes']:,} bytes{rank}. Written to {out_dir}",
        style="bold", soft_wrap=True,
    )  # fmt: skip


def _ranks(result: dict[str, Any]) -> str:
    ranks = result["ranks"]
    if result["format"] == "official":
        return f"{ranks['local']},{ranks['intra']},{ranks['inter']}"
    return f"{ranks['max']}" if ranks["min"] == ranks["max"] else f"{ranks['min']} to {ranks['max']}"


def _show(console: Any, result: dict[str, Any], out_dir: Path) -> None:
    ranks = _ranks(result)
    rank = f"rank {ranks}" if ranks.isdigit() else f"ranks {ranks}"
    console.print(
        f"{result['modules']} modules, {rank}, {result['parameters']:,} parameters, {result['bytes']:,} bytes "
        f"({result['dtype']}). Error against the compact form {result['relative_error']:.2e}. Written to {out_dir}",
        soft_wrap=True,
    )
