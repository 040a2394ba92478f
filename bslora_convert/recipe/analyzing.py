"""What `analyze` is asked for."""

from dataclasses import dataclass
from pathlib import Path

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_count, check_on_base
from bslora_convert.recipe.options import MODEL, OUTPUT, RUNNING, WHAT, device_option, option
from bslora_convert.recipe.reading import Reading

LEAST_DRAWS = 2


@dataclass(frozen=True, slots=True)
class AnalyzeOptions(Reading):
    """beside: further LoRAs whose A are compared with this one's. draws: random adapters behind each z-score.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    beside: tuple[Path, ...] = option((), "Compare the A of this LoRA too; repeatable.", WHAT, metavar="LORA")
    draws: int = option(8, "Draw this many random adapters for each z-score.", WHAT)
    base_model: str | None = option(
        None, "Add activations, of this base model, a directory or a hub name.", MODEL, metavar="MODEL"
    )
    prompts: str | Path | None = option(
        None, "Read the activations on these JSONL rows, gzip accepted.", MODEL, metavar="FILE"
    )
    limit: int | None = option(None, "Take the first rows only.", MODEL, usual="all")
    overwrite: bool = option(False, "Replace an earlier result in --out.", OUTPUT)
    device: str = device_option()
    seed: int = option(0, "Draw the random adapters from this.", RUNNING)

    def __post_init__(self) -> None:
        Reading.__post_init__(self)
        if self.draws < LEAST_DRAWS:
            raise RecipeError(f"draws is {self.draws}: a whole number of at least {LEAST_DRAWS} is allowed", "draws")
        check_on_base(self.base_model, self.prompts)
        check_count("limit", self.limit)
