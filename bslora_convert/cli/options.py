"""Command-line options made of the dataclasses that they fill: each field's type, help and section stand there."""

from collections.abc import Callable
from dataclasses import Field
from pathlib import Path
from types import UnionType
from typing import Any, ClassVar, get_args, get_origin

import click

from bslora_convert.recipe.files import DESCRIBED, merged, read_options
from bslora_convert.recipe.options import OUTPUT, RUNNING, SECTIONS, Option, flag_of, key_of, name_of, options_of
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.training import OPTIONS, Training


class Value(click.ParamType[Any]):
    """Whatever of several types a text can be read as, the strictest first; several values between marks for a tuple."""

    NAMES: ClassVar[dict[Any, str]] = {int: "N", float: "F", str: "TEXT"}

    def __init__(self, kind: Any, described: Option) -> None:
        self.kinds, self.between = _kinds(kind), described.between
        self.name = described.metavar or self.NAMES[self.kinds[-1]]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The value, converted once."""
        if not isinstance(value, str):
            return value
        if value == "" and bool in self.kinds:  # the option without a value
            return True
        for kind in self.kinds:
            try:
                if get_origin(kind) is tuple:
                    return self._several(kind, value)
                if kind is not bool:
                    return kind(value)
            except ValueError:
                continue
        self.fail(f"{value!r} is given, and {self.name} is expected", param, ctx)

    def _several(self, kind: Any, value: str) -> tuple[Any, ...]:
        one, *more = get_args(kind)
        found = tuple(one(word.strip()) for word in value.split(self.between) if word.strip())
        if not found or (more != [...] and len(found) != 1 + len(more)):
            raise ValueError
        return found


def _kinds(kind: Any) -> list[Any]:
    """The types of a field, those that take fewer texts first; None is left out, and a path stays as it is written."""
    kinds = {one for one in (get_args(kind) if isinstance(kind, UnionType) else (kind,)) if one is not type(None)}
    return [*(kinds - {int, float, Path, str}), *(one for one in (int, float, str) if one in kinds)]


class Flag(click.Option):
    """An option that knows its section of the help."""

    def __init__(self, *words: Any, section: str, **attributes: Any) -> None:
        super().__init__(*words, **attributes)
        self.section = section


class Command(click.Command):
    """A command whose help groups its options, and which names the recipe file for an option that is one of that alone."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes a section for each group that has options here."""
        for section in SECTIONS:
            own = [
                p
                for p in self.get_params(ctx)
                if isinstance(p, click.Option) and getattr(p, "section", RUNNING) == section
            ]
            rows = [row for param in own if (row := param.get_help_record(ctx)) is not None]
            if rows:
                with formatter.section(section):
                    formatter.write_dl(rows)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """:raises click.UsageError: naming the recipe file, for an option that stands there alone."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            name = name_of(error.option_name.lstrip("-"))
            if name not in DESCRIBED or not any(param.name == RECIPE_FILE for param in self.params):
                raise
            raise click.UsageError(
                f"{error.option_name} is an option of the recipe file: write `{key_of(name)} = …` into a file, and give it with "
                "--recipe FILE (`bslora-convert recipe` prints one)",
                ctx,
            ) from None


RECIPE_FILE = "recipe_file"
recipe_file_option = click.option(
    "--recipe",
    RECIPE_FILE,
    type=click.Path(path_type=Path),
    help="Read options from a TOML or JSON file, or from an earlier fidelity.json; those given here come first.",
)


def out_option(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--out` of a verb that writes a record, a page and plots of this name."""
    help = f"Write {name}.json, {name}.html and the plots into this directory."
    return click.option("--out", type=click.Path(path_type=Path), cls=Flag, section=OUTPUT, help=help)


def takes(*kinds: type, verb: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds an option for each field of some dataclasses that a verb's command line has; a later one of a name comes first.

    A value is None where it is not given, so that the dataclass's default stands.
    """
    described = {name: one for kind in kinds for name, one in options_of(kind).items() if one[1].is_flag_of(verb)}

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for field, option in reversed(described.values()):
            function = _click_option(field, option)(function)
        return function

    return add


def _click_option(field: Field[Any], option: Option) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    flag, kind = option.flag or flag_of(field.name), field.type
    attributes: dict[str, Any] = {
        "help": option.help + _default(field, option),
        "section": option.section,
        "default": None,
        "metavar": option.metavar,
    }
    if kind == bool | None or (kind is bool and not field.default):
        attributes |= {"is_flag": True}
    elif kind is bool:
        flag = f"{flag}/--no-{flag.removeprefix('--')}"
    elif kind == tuple[Path, ...]:
        attributes |= {"type": click.Path(path_type=Path), "multiple": True}
    else:
        attributes |= {"type": click.Choice(option.choices) if option.choices else Value(kind, option)}
        if option.alone is not None:
            attributes |= {"is_flag": False, "flag_value": option.alone}
    return click.option(flag, field.name, cls=Flag, **attributes)


def _default(field: Field[Any], option: Option) -> str:
    value = "on" if field.default is True else field.default
    if isinstance(value, tuple):
        value = option.between.join(map(str, value))
    shown = option.usual or ("" if value is None or value is False else f"{value}")
    return f"  [default: {shown}]" if shown else ""


def given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that stand on the command line."""
    return {name: value for name, value in options.items() if value is not None and value != ()}


def chosen(options: dict[str, Any], file: Path | None) -> tuple[Recipe, Training, dict[str, Any]]:
    """The recipe and the training that the command line and a file ask for, and the options that are of neither.

    :raises RecipeError: for a value that is not allowed. :raises InputError: for a file that can't be read.
    """
    said = given(options)
    own = {name: value for name, value in said.items() if name in DESCRIBED}
    values = merged(read_options(file) if file is not None else {}, own)
    settings = {name: values.pop(name) for name in OPTIONS if name in values}
    recipe = Recipe(**values)
    return recipe, Training(**settings, seed=recipe.seed), {name: said[name] for name in said if name not in own}
