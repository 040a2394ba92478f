"""What the base model is asked: on which prompts a fit is measured, and on which it is distilled."""

from dataclasses import dataclass

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice

METRICS = ("input", "two-sided")


@dataclass(frozen=True, slots=True)
class Evidence:
    """base_model: directory or hub name. calibration, finetune: prompt files, which need it. metric: of the calibration.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    base_model: str | None = None
    calibration: str | None = None
    metric: str = "input"
    finetune: str | None = None

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        if self.metric != "input" and self.calibration is None:
            raise RecipeError(
                f"metric is {self.metric!r}: it is taken on prompts, so give calibration", "metric", "calibration"
            )
        prompts = [name for name in ("calibration", "finetune") if getattr(self, name) is not None]
        if prompts and self.base_model is None:
            raise RecipeError(f"{prompts[0]} needs the base model: give base_model", prompts[0], "base_model")
        if self.base_model is not None and not prompts:
            raise RecipeError(
                "base_model is used by calibration and finetune only: give one of them a prompt file",
                "base_model",
                "calibration",
                "finetune",
            )
