"""`push`: a result onto the Hub."""

from pathlib import Path
from typing import Any

import click

from bslora_convert.cli.early import look
from bslora_convert.cli.verb import Output, verb
from bslora_convert.results.library import Pushed


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("repo", metavar="ORG/NAME")
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded, and upload nothing.")
@click.option("--reports", is_flag=True, help="Upload pages and measurements too, which hold rows of prompts.")
@verb
def push(output: Output, directory: Path, repo: str, dry_run: bool, reports: bool) -> None:
    """Uploads an adapter or a library to a repository of the Hub.

    DIRECTORY is what compress, finetune, expand or batch wrote. Of a library the tenants go, each in its folder. Records and
    cards name no place of this machine. A token comes from `hf auth login` or HF_TOKEN.

    \b
    Example:
      bslora-convert push ./compact my-org/my-adapters --dry-run
      bslora-convert push ./my-lora-compact my-org/my-lora
    """
    look([directory])
    from bslora_convert.verbs.push import push as run

    result = run(directory, repo, reports=reports, dry_run=dry_run)
    output.result(result, lambda console: _show(console, result))


def _show(console: Any, result: Pushed) -> None:
    if result.dry_run:
        for name in result.names:
            console.print(name, style="dim")
    verb = "Would push" if result.dry_run else "Pushed"
    console.print(
        f"{verb} {result.files} files, {result.bytes:,} bytes, to https://huggingface.co/{result.repo}", style="bold"
    )
