"""What the result must reach: a size or an error, exactly one of them."""

from dataclasses import dataclass, fields

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_share, is_whole
from bslora_convert.recipe.form import LARGEST_RANK

DEFAULT_BUDGET = 0.4459  # the paper's share of LoRA's parameters, the mean over its models and transforms


@dataclass(frozen=True, slots=True)
class Aim:
    """One of these; `budget` is 0.4459 where none is given.

    budget: share of the LoRA's parameters. ranks: local, intra and inter rank by hand. Both in floats, unless bits are given.
    max_error: relative error of the smallest result. bytes: share of the source's file. For both, rank and precision are chosen
    together.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    budget: float | None = None
    ranks: tuple[int, int, int] | None = None
    max_error: float | None = None
    bytes: float | None = None

    @property
    def chooses_precision(self) -> bool:
        """Whether rank and precision are chosen together, so that numbers are in codes."""
        return self.bytes is not None or self.max_error is not None

    def __post_init__(self) -> None:
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{given[0]} and {given[1]} exclude each other: give one of them", *given[:2])
        if not given:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
        check_share("budget", self.budget, "a share of the parameters")
        check_share("max_error", self.max_error, "a relative error", one=False)
        check_share("bytes", self.bytes, "a share of the source's file")
        if self.ranks is not None:
            object.__setattr__(self, "ranks", _triple(self.ranks))


def _triple(given: object) -> tuple[int, int, int]:
    ranks = tuple(given) if isinstance(given, tuple | list) else ()
    if len(ranks) != 3 or not all(is_whole(rank) and 0 <= rank <= LARGEST_RANK for rank in ranks):
        raise RecipeError(
            f"ranks is {given!r}: three whole numbers local,intra,inter from 0 to {LARGEST_RANK} are allowed", "ranks"
        )
    if not any(ranks):
        raise RecipeError("ranks is 0,0,0: at least one part needs a rank above 0", "ranks")
    return ranks
