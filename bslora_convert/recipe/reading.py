"""What the user knows of the source, where its configuration does not say it or says what this version does not know."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import is_number
from bslora_convert.recipe.options import SOURCE, option


@dataclass(frozen=True, slots=True)
class Reading:
    """lora_alpha, use_rslora: PEFT's; None leaves them to the configuration. ignore_field: settings that are not known here.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    lora_alpha: float | None = option(None, "Set the source's lora_alpha, where its configuration lacks it.", SOURCE)
    use_rslora: bool | None = option(
        None, "Scale the source by alpha / √r, where its configuration does not say so.", SOURCE
    )
    ignore_field: tuple[str, ...] = option(
        (),
        "Leave out these settings of the source's configuration, which this version does not know: you answer for it.",
        SOURCE,
        metavar="NAME,…",
    )

    def __post_init__(self) -> None:
        if self.lora_alpha is not None and not is_number(self.lora_alpha):
            raise RecipeError(f"lora_alpha is {self.lora_alpha!r}: a finite number is allowed", "lora_alpha")
        if self.use_rslora not in (None, True, False):
            raise RecipeError(f"use_rslora is {self.use_rslora!r}: true or false is allowed", "use_rslora")
        names = self.ignore_field
        if not isinstance(names, tuple | list) or not all(isinstance(name, str) and name for name in names):
            raise RecipeError(f"ignore_field is {names!r}: names of settings are allowed", "ignore_field")
        object.__setattr__(self, "ignore_field", tuple(names))

    @property
    def arguments(self) -> dict[str, Any]:
        """What `load_lora` is told."""
        return {"alpha": self.lora_alpha, "rslora": self.use_rslora, "ignore": self.ignore_field}

    @classmethod
    def arguments_in(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The same of options by name, of which these are some."""
        return cls(options.get("lora_alpha"), options.get("use_rslora"), options.get("ignore_field") or ()).arguments
