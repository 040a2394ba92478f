"""What `compare` is asked for."""

import math
from dataclasses import dataclass
from pathlib import Path

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice, check_count, check_on_base
from bslora_convert.recipe.options import FORM, MODEL, OUTPUT, RUNNING, WHAT, device_option, option
from bslora_convert.recipe.reading import Reading
from bslora_convert.recipe.storage import DTYPES, checked_init, init_option


@dataclass(frozen=True, slots=True)
class CompareOptions(Reading):
    """budgets: shares of the LoRA's bytes. forms: names of `comparison.forms.FORMS`, the usual ones where none is named.

    init: where A's random initialisation is looked for, which forms in our codes use, and those that end in `_initial`.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    budgets: tuple[float, ...] = option(
        (0.5, 0.25, 0.125), "Fit at these shares of the LoRA's bytes.", WHAT, metavar="F,F,…"
    )
    forms: tuple[str, ...] = option((), "Fit these forms only.", WHAT, metavar="A,B,…", usual="all but …_initial")
    base_model: str | None = option(
        None, "Measure behaviour too, on this base model, a directory or a hub name.", MODEL, metavar="MODEL"
    )
    prompts: str | Path | None = option(None, "Measure it on these JSONL rows, gzip accepted.", MODEL, metavar="FILE")
    limit: int | None = option(None, "Take the first rows only.", MODEL, usual="all")
    batch_size: int = option(8, "Run this many rows at once.", MODEL)
    dtype: str = option("auto", "Store numbers in this type; auto = the source's.", FORM, choices=DTYPES)
    init: int | str = init_option()
    save: bool = option(False, "Write each form into --out as an adapter that PEFT loads.", OUTPUT)
    overwrite: bool = option(False, "Replace an earlier result in --out.", OUTPUT)
    device: str = device_option()
    seed: int = option(0, "Draw random numbers from this.", RUNNING)

    def __post_init__(self) -> None:
        Reading.__post_init__(self)
        for budget in self.budgets:
            if not (math.isfinite(budget) and 0 < budget <= 1):
                raise RecipeError(
                    f"budgets holds {budget!r}: shares of the LoRA's bytes, 0 < budget <= 1, are allowed", "budgets"
                )
        if not self.budgets:
            raise RecipeError("budgets is empty: give at least one share of the LoRA's bytes", "budgets")
        check_on_base(self.base_model, self.prompts)
        check_choice("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "init", checked_init(self.init))
        check_count("limit", self.limit)
        check_count("batch_size", self.batch_size)
