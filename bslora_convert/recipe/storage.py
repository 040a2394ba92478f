"""What the result's numbers are stored in."""

from dataclasses import dataclass
from typing import Any

from bslora_convert.bslora.codes.widths import WIDTHS
from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice, is_whole
from bslora_convert.recipe.options import FORM, option

DTYPES = ("auto", "float32", "bfloat16", "float16")
TABLES = ("auto", "bfloat16", "float16")
GAINS = ("unbiased", "least-squares")
INITS = ("auto", "none", "search")


def init_option() -> Any:
    """Where A's random initialisation is looked for."""
    return option(
        "auto",
        "Look for A's random initialisation among usual seeds (auto), thoroughly (search) or not at all; or name its seed or "
        "adapter.",
        FORM, metavar="auto|none|search|SEED|DIR",
    )  # fmt: skip


def checked_init(value: int | str) -> int | str:
    """The value of such an option, a seed as a number.

    :raises RecipeError: for one that is not allowed.
    """
    value = int(value) if isinstance(value, str) and value.isascii() and value.isdecimal() else value
    if not ((isinstance(value, str) and value) or (is_whole(value) and 0 <= value < 1 << 64)):
        raise RecipeError(f"init is {value!r}: {', '.join(INITS)}, a seed or an adapter's directory is allowed", "init")
    return value


def began_from(init: object) -> str | None:
    """The adapter that training went on from, where such an option names one."""
    return init if isinstance(init, str) and init not in INITS else None


@dataclass(frozen=True, slots=True)
class Storage:
    """dtype: of the tensors that a reader gets, auto = the source's. tables: of weights that are carried whole.

    bits: one width for every coded number.
    gain: `unbiased`: each module's update is scaled so that ⟨ΔW, ΔŴ⟩ = ‖ΔW‖², which nearly always behaves better;
    `least-squares`: as the fit left it, of least weight error.
    init: where A's random initialisation is looked for: `auto`, `none`, `search`, a seed, or the adapter (its directory, a URL)
    that training went on from.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    dtype: str = option("auto", "Store numbers in this type; auto = the source's.", FORM, choices=DTYPES)
    tables: str = option(
        "auto", "Store weights that the adapter holds whole, saved embeddings and heads, in this type; auto = as they are.", FORM,
        choices=TABLES,
    )  # fmt: skip
    bits: int | None = option(
        None, "Store every coded number in this many bits; with --budget or --ranks it codes what they give.", FORM,
        choices=WIDTHS,
    )  # fmt: skip
    gain: str = option(
        "unbiased", "Scale each module's update to the original's strength (unbiased), or leave it at the least error.", FORM,
        choices=GAINS,
    )  # fmt: skip
    init: int | str = init_option()

    @property
    def begins(self) -> str | None:
        """As `began_from`."""
        return began_from(self.init)

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, DTYPES)
        object.__setattr__(self, "init", checked_init(self.init))
        check_choice("gain", self.gain, GAINS)
        check_choice("tables", self.tables, TABLES)
        if self.bits is not None and self.bits not in WIDTHS:
            raise RecipeError(f"bits is {self.bits!r}: one of {', '.join(map(str, WIDTHS))} is allowed", "bits")

    @property
    def is_unbiased(self) -> bool:
        """Whether updates are scaled to the original's strength."""
        return self.gain == "unbiased"
