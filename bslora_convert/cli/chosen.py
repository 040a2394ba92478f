"""What a command line asks for: its own options over those of a file."""

from pathlib import Path
from typing import Any

import click

from bslora_convert.recipe.files import merged, read_options
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.training import OPTIONS, Training


def given() -> set[str]:
    """The present command's parameters that stand on the command line."""
    context = click.get_current_context()
    return {
        name for name in context.params if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    }


def chosen(options: dict[str, Any], file: Path | None) -> tuple[Recipe, Training]:
    """The recipe and the training that are asked for; `options` loses what it is taken from.

    :raises RecipeError: for a value that is not allowed. :raises InputError: for a file that can't be read.
    """
    said = given()
    names = [name for name in (*OPTIONS, *Recipe().options()) if name in options]
    own = {name: value for name in names if (value := options.pop(name)) is not None and name in said}
    values = merged(read_options(file) if file is not None else {}, own)
    settings = {name: values.pop(name) for name in OPTIONS if name in values}
    recipe = Recipe(**values)
    return recipe, Training(**settings, seed=recipe.seed)
