"""Options are fields of frozen dataclasses; what a field asks for stands beside its default, for command line and recipe file."""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, replace
from typing import Any, TypeVar

TARGET = "What the result must reach (one of these)"
WHAT = "What to measure"
THRESHOLDS = "Thresholds: exit code 1 when one is missed"
WHOM = "Adapters and base model"
MODEL = "Base model and prompts"
TRAINING = "Distillation"
FORM = "Form and storage"
SOURCE = "The source"
LIBRARY = "The library"
OUTPUT = "Output"
RUNNING = "Running"
SECTIONS = (
    TARGET,
    WHAT,
    THRESHOLDS,
    WHOM,
    MODEL,
    TRAINING,
    FORM,
    SOURCE,
    LIBRARY,
    OUTPUT,
    RUNNING,
)  # as help shows them

Options = TypeVar("Options")


@dataclass(frozen=True, slots=True)
class Option:
    """What a field asks for.

    help: a verb phrase. section: of `SECTIONS`. choices: what is allowed. usual: what a default of None stands for.
    verbs: whose command line has it, None for each that takes the field; empty: the recipe file alone. flag: its name there
    where that is another. metavar: how its value is written. alone: what it means without a value. between: what stands between
    several values.
    """

    help: str
    section: str
    choices: tuple[Any, ...] = ()
    usual: str = ""
    verbs: tuple[str, ...] | None = None
    flag: str = ""
    metavar: str | None = None
    alone: str | None = None
    between: str = ","

    def is_flag_of(self, verb: str) -> bool:
        """Whether a verb's command line has it."""
        return self.verbs is None or verb in self.verbs


def option(default: Any, help: str, section: str, **more: Any) -> Any:
    """A field with its default and what it asks for; more: of `Option`."""
    return field(default=default, metadata={"option": Option(help, section, **more)})


def device_option() -> Any:
    """Where to compute."""
    return option("auto", "Compute here: auto, cpu, cuda or cuda:N.", RUNNING, metavar="DEVICE")


def accept_changed_option() -> Any:
    """Whether changed weights are read."""
    help = "Take weights that are not what was written and measured any more (re-saved, damaged)."
    return option(False, help, WHOM)


def base_dtype_option(**more: Any) -> Any:
    """The type that a base model runs in."""
    help = "Run the base model in this type; auto = float32 on a CPU, its own on a GPU."
    return option("auto", help, RUNNING, metavar="TYPE", **more)


def options_of(kind: type) -> dict[str, tuple[Field[Any], Option]]:
    """The options among a dataclass's fields, by name."""
    return {one.name: (one, one.metadata["option"]) for one in fields(kind) if "option" in one.metadata}


def built(kind: type[Options], options: Options | None, given: Mapping[str, Any]) -> Options:
    """The options that are given as an object, as its fields or as both; fields come first.

    :raises RecipeError: as the dataclass does.
    """
    return kind(**given) if options is None else replace(options, **given)  # type: ignore[type-var]


def flag_of(name: str) -> str:
    """A Python option's name on the command line: `max_error` -> `--max-error`."""
    return f"--{key_of(name)}"


def key_of(name: str) -> str:
    """A Python option's name in a recipe file: `max_error` -> `max-error`."""
    return name.replace("_", "-")


def name_of(key: str) -> str:
    """The Python name of a recipe file's key: `max-error` -> `max_error`."""
    return key.replace("-", "_")
