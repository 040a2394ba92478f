"""Options in a file: TOML or JSON, flat, under the command line's names; or what an earlier result records in `fidelity.json`.

transform = "none"
max-error = 0.1
"""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bslora_convert.errors import RecipeError
from bslora_convert.files.jsonfile import parsed, read_json
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.target import TARGETS
from bslora_convert.recipe.training import OPTIONS


def read_options(path: str | Path) -> dict[str, Any]:
    """The options that a file gives, of a recipe and of a training, by Python's names.

    :raises InputError: when the file is missing or neither TOML nor JSON. :raises RecipeError: for an option that is not known.
    """
    path = Path(path)
    values = parsed(path, tomllib.loads, "TOML") if path.suffix == ".toml" else read_json(path)
    if isinstance(values.get("recipe"), dict) and "tool_version" in values:  # fidelity.json of an earlier result
        training = values.get("training")
        own = training.get("options", {}) if isinstance(training, dict) else {}
        values = {**values["recipe"], **{name: own[name] for name in OPTIONS if name in own}}
    options = {str(name).replace("-", "_"): value for name, value in values.items() if value is not None}
    unknown = sorted(set(options) - {*Recipe().options(), *OPTIONS})
    if unknown:
        raise RecipeError(f"{path}: {unknown[0]} is no option of a recipe")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def merged(file: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a file under those given beside it; a size or an error that is given replaces the file's."""
    kept = {
        name: value
        for name, value in file.items()
        if not (name in TARGETS and any(target in given for target in TARGETS))
    }
    return {**kept, **given}


def to_toml(recipe: Recipe) -> str:
    """A recipe as a file that `read_options` reads; what is not said is left out."""
    lines = [
        f"{name.replace('_', '-')} = {json.dumps(value, ensure_ascii=False)}" for name, value in recipe.given().items()
    ]
    return "\n".join(lines) + "\n"
