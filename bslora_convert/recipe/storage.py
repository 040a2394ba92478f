"""What the result's numbers are stored in."""

from dataclasses import dataclass

from bslora_convert.bslora.coding.widths import WIDTHS
from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Storage:
    """dtype: of the tensors that a reader gets, auto = the source's. bits: one width for every coded number.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    dtype: str = "auto"
    bits: int | None = None

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        if self.bits is not None and self.bits not in WIDTHS:
            raise RecipeError(f"bits is {self.bits!r}: one of {', '.join(map(str, WIDTHS))} is allowed", "bits")
