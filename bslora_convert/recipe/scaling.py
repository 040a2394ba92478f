"""The source's scaling, where its configuration lacks it."""

from dataclasses import dataclass
from typing import Any

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import is_number
from bslora_convert.recipe.options import SOURCE, option


@dataclass(frozen=True, slots=True)
class Scaling:
    """lora_alpha, use_rslora: PEFT's; None leaves them to the configuration.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    lora_alpha: float | None = option(None, "Set the source's lora_alpha, where its configuration lacks it.", SOURCE)
    use_rslora: bool | None = option(
        None, "Scale the source by alpha / √r, where its configuration does not say so.", SOURCE
    )

    def __post_init__(self) -> None:
        if self.lora_alpha is not None and not is_number(self.lora_alpha):
            raise RecipeError(f"lora_alpha is {self.lora_alpha!r}: a finite number is allowed", "lora_alpha")
        if self.use_rslora not in (None, True, False):
            raise RecipeError(f"use_rslora is {self.use_rslora!r}: true or false is allowed", "use_rslora")

    @property
    def given(self) -> dict[str, Any]:
        """What `load_lora` is told."""
        return {"alpha": self.lora_alpha, "rslora": self.use_rslora}
