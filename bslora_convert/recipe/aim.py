"""What the result must reach: a behaviour, an error or a size, exactly one of them."""

import math
from dataclasses import dataclass, field, fields

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_share, is_number, is_whole
from bslora_convert.recipe.form import LARGEST_RANK
from bslora_convert.recipe.options import TARGET, option

DEFAULT_ERROR = 0.1
BEHAVIOURS = ("min_retention", "max_kl", "min_agreement")


@dataclass(frozen=True, slots=True)
class Aim:
    """One of these; `max_error` is 0.1 where none is given, and then what comes nearest will do where it can't be had.

    min_retention, max_kl, min_agreement: behaviour of the smallest result, as `verify` measures it, on rows held out of the fit.
    max_error: relative error of the smallest result. bytes: share of the source's file. For all of these, rank and precision are
    chosen together. budget: share of the LoRA's parameters. ranks: local, intra and inter rank by hand. Both in floats, unless
    bits are given.
    asked: whether one was given.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    min_retention: float | None = option(
        None,
        "Find the smallest result that keeps this share of the adapter's effect on held-out rows of --prompts.",
        TARGET,
    )
    max_kl: float | None = option(
        None, "Find the smallest result of at most this KL to the original there, in nats a token.", TARGET
    )
    min_agreement: float | None = option(
        None, "Find the smallest result that predicts the same next token this often there.", TARGET
    )
    max_error: float | None = option(
        None, "Find the smallest file whose relative weight error is at most this.", TARGET, usual="0.1"
    )
    bytes: float | None = option(
        None, "Use this share of the source's file: rank and precision are chosen together, in codes.", TARGET
    )
    budget: float | None = option(None, "Use this share of the LoRA's parameters, in floats.", TARGET)
    ranks: tuple[int, int, int] | None = option(
        None, "Set the local, intra and inter rank by hand, in floats.", TARGET, metavar="L,A,E"
    )
    asked: bool = field(default=True, init=False, compare=False)

    @property
    def behaviour(self) -> tuple[str, float] | None:
        """The measure of behaviour that is aimed at, with its limit; None for an error or a size."""
        return next(((name, limit) for name in BEHAVIOURS if (limit := getattr(self, name)) is not None), None)

    @property
    def chooses_precision(self) -> bool:
        """Whether rank and precision are chosen together, so that numbers are in codes."""
        return self.budget is None and self.ranks is None

    def __post_init__(self) -> None:
        given = [name for name in AIMS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{given[0]} and {given[1]} exclude each other: give one of them", *given[:2])
        if not given:
            object.__setattr__(self, "max_error", DEFAULT_ERROR)
            object.__setattr__(self, "asked", False)
        check_share("min_retention", self.min_retention, "a share of the adapter's effect", one=False)
        check_share("min_agreement", self.min_agreement, "a share of the tokens", one=False)
        if self.max_kl is not None and not (is_number(self.max_kl) and 0 < self.max_kl < math.inf):
            raise RecipeError(f"max_kl is {self.max_kl!r}: a number of nats above 0 is allowed", "max_kl")
        check_share("budget", self.budget, "a share of the parameters")
        check_share("max_error", self.max_error, "a relative error", one=False)
        check_share("bytes", self.bytes, "a share of the source's file")
        if self.ranks is not None:
            object.__setattr__(self, "ranks", _triple(self.ranks))


AIMS = tuple(one.name for one in fields(Aim) if one.init)


def _triple(given: object) -> tuple[int, int, int]:
    ranks = tuple(given) if isinstance(given, tuple | list) else ()
    if len(ranks) != 3 or not all(is_whole(rank) and 0 <= rank <= LARGEST_RANK for rank in ranks):
        raise RecipeError(
            f"ranks is {given!r}: three whole numbers local,intra,inter from 0 to {LARGEST_RANK} are allowed", "ranks"
        )
    if not any(ranks):
        raise RecipeError("ranks is 0,0,0: at least one part needs a rank above 0", "ranks")
    return ranks
