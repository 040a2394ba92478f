"""`expand`: a compact adapter back as a standard PEFT LoRA, as an engine loads it, or in the BSLoRA authors' layout."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.options import Command, given, takes
from bslora_convert.cli.screen import show_failed, table
from bslora_convert.cli.verb import Output, verb
from bslora_convert.recipe.expanding import ExpandOptions
from bslora_convert.results.adapter import Expanded, ServedRecord
from bslora_convert.results.library import LibraryExpansion


@click.command(cls=Command)
@click.argument("compact_dir", metavar="COMPACT", type=click.Path(path_type=Path))
@click.argument("out_dir", type=click.Path(path_type=Path))
@takes(ExpandOptions, verb="expand")
@verb
def expand(output: Output, compact_dir: Path, out_dir: Path, **options: Any) -> None:
    """Writes a compact adapter back as a standard PEFT LoRA, or as what an engine reads.

    All scaling is in B, and lora_alpha equals r, the largest rank of any module. Engines that take one rank only, or divide by
    a tensor's own rank, need --for ENGINE or --rank uniform: without it they would scale modules of smaller rank wrongly, or
    refuse the file. COMPACT may also be in the BSLoRA authors' layout, which --format official writes. Of a library that batch
    made every adapter is written, to OUT_DIR/<id>; one that is broken stops no other, and makes the exit code 1.

    \b
    Example:
      bslora-convert expand ./my-lora-compact ./my-lora-again
      bslora-convert expand ./my-lora-compact ./for-sglang --for sglang
      bslora-convert expand ./my-lora-compact ./for-server --for vllm --rank 8 --base-model my-org/my-model
      bslora-convert expand ./my-lora-compact ./for-llama-cpp --for llama.cpp --base-model ./base --dtype q8_0
      bslora-convert expand ./compact-library ./for-the-servers --for vllm
    """
    asked = ExpandOptions(**given(options))
    look([compact_dir])
    from bslora_convert.library.manifest import is_library

    if is_library(compact_dir):
        _library(output, compact_dir, out_dir, asked)
        return
    look([compact_dir], out=out_dir, overwrite=asked.overwrite)
    from bslora_convert.verbs.expand import expand as run

    with output.bar("expand"):
        result = run(compact_dir, out_dir, asked)
    output.notes(result.notes)
    from bslora_convert.report import commands

    following = commands.after_expand(result, str(out_dir))
    output.result(result, lambda console: _show(console, result, out_dir), following)


def _library(output: Output, library: Path, out_dir: Path, asked: ExpandOptions) -> None:
    """Every adapter of a library; exit code 1 where something went wrong with one."""
    if not asked.overwrite:  # with it, each adapter's own directory is what is looked at
        look([library], out=out_dir)
    from bslora_convert.verbs.expand_library import expand_library

    try:
        with output.bar("expand") as progress:
            result = expand_library(library, out_dir, asked, progress=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; the adapters that were written stay in {out_dir}") from None
    output.notes(result.notes)
    from bslora_convert.report import commands

    following = commands.after_expand(result, str(out_dir)) if not result.bad else None
    output.result(result, lambda console: _show_library(console, result, out_dir), following)
    if result.bad:
        sys.exit(1)


def _show_library(console: Any, result: LibraryExpansion, out_dir: Path) -> None:
    good = [row for row in result.rows if row["status"] == "ok"]
    shown = table(["adapter"], ["ranks", "parameters", "bytes", "error against the original"])
    for row in good:
        ranks, known = _ranks(row["format"], row["ranks"]), row.get("original")
        error = f"{known['relative_error']:.4f}" if known else "not known"
        shown.add_row(row["id"], ranks, f"{row['parameters']:,}", f"{row['bytes']:,}", error)
    if good:
        console.print(shown)
    show_failed(console, result.rows)
    console.print(
        f"{len(good)} of {result.adapters} adapters, {result.bytes:,} bytes. {_slot(result.served)}Written to {out_dir}",
        style="bold", soft_wrap=True,
    )  # fmt: skip


def _ranks(format: str, ranks: Mapping[str, int]) -> str:
    if format == "official":
        return f"{ranks['local']},{ranks['intra']},{ranks['inter']}"
    return f"{ranks['max']}" if ranks["min"] == ranks["max"] else f"{ranks['min']} to {ranks['max']}"


def _slot(served: ServedRecord | None) -> str:
    """What a server reserves, as a sentence; nothing where it reserves no slots."""
    if served is None:
        return ""
    if served.max_lora_rank is None:
        return "No server slot holds its rank. "
    return f"A server's slot: rank {served.max_lora_rank} (--max-lora-rank), {served.slot_bytes:,} bytes. "


def _show(console: Any, result: Expanded, out_dir: Path) -> None:
    ranks, original = _ranks(result.format, result.ranks), result.original
    rank = f"rank {ranks}" if ranks.isdigit() else f"ranks {ranks}"
    against = f", against the original LoRA at most {original.relative_error:.4f}" if original else ""
    console.print(
        f"{result.modules} modules, {rank}, {result.parameters:,} parameters, {result.bytes:,} bytes ({result.dtype}). "
        f"Error against the compact form {result.relative_error:.2e}{against}. {_slot(result.served)}Written to {out_dir}",
        soft_wrap=True,
    )
