"""Options in a file: TOML or JSON, flat, under the command line's names; or what an earlier result records in `fidelity.json`.

transform = "none"
max-error = 0.1
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field
from pathlib import Path
from typing import Any

from bslora_convert.errors import RecipeError
from bslora_convert.files.jsonfile import parsed, read_json
from bslora_convert.recipe.options import SECTIONS, Option, flag_of, key_of, name_of, options_of
from bslora_convert.recipe.recipe import RECIPE_PARTS, Recipe
from bslora_convert.recipe.target import TARGETS
from bslora_convert.recipe.training import OPTIONS, Training

Described = dict[str, tuple[Field[Any], Option]]
DESCRIBED: Described = {  # every option of a recipe's file
    name: described
    for kind in (*RECIPE_PARTS.values(), Training, Recipe)
    for name, described in options_of(kind).items()
}
VERBS = ("compress", "finetune")  # who takes some of them as flags


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
    options = {name_of(str(key)): value for key, value in values.items() if value is not None}
    unknown = sorted(set(options) - set(DESCRIBED))
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


def to_toml(options: Mapping[str, Any]) -> str:
    """Options as a file that `read_options` reads; None is left out."""
    return "".join(f"{_line(name, value)}\n" for name, value in options.items() if value is not None)


def call(options: Mapping[str, Any], verb: str = "compress") -> tuple[list[str], dict[str, Any]]:
    """(The flags that say some options on a verb's command line, those options that have no flag there)."""
    words: list[str] = []
    rest: dict[str, Any] = {}
    for name, value in options.items():
        described = DESCRIBED[name][1]
        if not described.is_flag_of(verb):
            rest[name] = value
            continue
        text = described.between.join(map(str, value)) if isinstance(value, tuple) else f"{value}"
        words += [described.flag or flag_of(name), *([] if value is True else [text])]
    return words, rest


def commented() -> str:
    """Every option of a recipe's file with its default and what it does; those whose default is nothing are commented out."""
    return "\n".join(_lines()) + "\n"


def described() -> dict[str, dict[str, Any]]:
    """The same as an object: by the file's key, what an option does, its default, what is allowed, and its flag if any."""
    return {
        key_of(name): {
            "help": option.help,
            "section": option.section,
            "default": list(field.default) if isinstance(field.default, tuple) else field.default,
            "usual": option.usual or None,
            "choices": list(option.choices) or None,
            "flag": _flag(name, option),
        }
        for name, (field, option) in DESCRIBED.items()
    }


def spelled(name: str) -> str:
    """An option as a user writes it: its flag, or its key in a recipe's file."""
    return (_flag(name, DESCRIBED[name][1]) if name in DESCRIBED else flag_of(name)) or key_of(name)


def _flag(name: str, option: Option) -> str | None:
    return (option.flag or flag_of(name)) if any(option.is_flag_of(verb) for verb in VERBS) else None


def _lines() -> Iterator[str]:
    yield "# Options of `compress`, `batch` and `finetune`, for --recipe FILE: an option on the command line comes first."
    yield "# An option without a flag in brackets is one of this file alone."
    for section in SECTIONS:
        own = {name: described for name, described in DESCRIBED.items() if described[1].section == section}
        if own:
            yield from ("", f"# {section}")
        for name, (field, option) in own.items():
            flag = _flag(name, option)
            allowed = f" One of {', '.join(map(str, option.choices))}." if option.choices else ""
            usual = f" Default: {option.usual}." if option.usual else ""
            yield from ("", f"# {option.help}{allowed}{usual}{f' [{flag}]' if flag else ''}")
            yield f"# {key_of(name)} =" if field.default is None else _line(name, field.default)


def _line(name: str, value: Any) -> str:
    return f"{key_of(name)} = {json.dumps(value, ensure_ascii=False)}"
