"""`recipe`: every option of a recipe's file."""

import click

from bslora_convert.cli.verb import Output, verb
from bslora_convert.recipe.files import commented, described


@click.command()
@verb
def recipe(output: Output) -> None:
    """Prints every option as a commented TOML file, with its default.

    Change what you need, and give the file to `compress`, `batch` or `finetune` with --recipe. Options that only an expert
    decides stand in this file alone.

    \b
    Example:
      bslora-convert recipe > recipe.toml
    """
    output.result(described(), lambda _: click.echo(commented(), nl=False))
