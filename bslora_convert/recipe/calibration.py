"""The base model, and the rows that it is run on: for calibration, validation and test, and for distillation."""

from dataclasses import dataclass

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice
from bslora_convert.recipe.options import MODEL, TRAINING, option

METRIC_NAMES = ("auto", "output", "input", "two-sided")


@dataclass(frozen=True, slots=True)
class Calibration:
    """The base model, and the rows that it is run on.

    base_model: directory or hub name; of saved tables only rows that are not its own are kept. prompts: a file of rows, split
    into calibration, validation and test rows. metric: of these prompts; auto = the best one on the validation rows. finetune: a
    file to distil on, or True for the rows of `prompts`.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    base_model: str | None = option(
        None,
        "Name the base model, a directory or a hub name, for --prompts and --finetune; rows of saved tables that are its own are "
        "left out.",
        MODEL, metavar="MODEL",
    )  # fmt: skip
    prompts: str | None = option(
        None, "Fit for the base model's behaviour on these JSONL rows, and measure it on rows held out of them.", MODEL,
        metavar="FILE",
    )  # fmt: skip
    metric: str = option(
        "auto",
        "Weight the fit's error by output gradients, by input activations or by both; auto = the best on validation rows.",
        MODEL, choices=METRIC_NAMES,
    )  # fmt: skip
    finetune: str | bool | None = option(
        None, "Distil against the original after the fit, on a JSONL file or without one on the rows of --prompts.", TRAINING,
        metavar="[FILE]", alone="",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRIC_NAMES)
        if not self.finetune:
            object.__setattr__(self, "finetune", None)
        if self.metric != "auto" and self.prompts is None:
            raise RecipeError(f"metric is {self.metric!r}: it needs prompts", "metric", "prompts")
        if self.finetune is True and self.prompts is None:
            raise RecipeError("finetune without a file is on the rows of prompts: give prompts", "finetune", "prompts")
        named = [name for name in ("prompts", "finetune") if getattr(self, name) is not None]
        if named and self.base_model is None:
            raise RecipeError(f"{named[0]} needs the base model: give base_model", named[0], "base_model")

    @property
    def runs(self) -> bool:
        """Whether the base model is run, and not only looked at for the rows of saved tables that it holds itself."""
        return self.prompts is not None or self.finetune is not None

    @property
    def files(self) -> dict[str, str]:
        """The prompt files, by option."""
        named = {"prompts": self.prompts, "finetune": self.finetune}
        return {name: file for name, file in named.items() if isinstance(file, str)}
