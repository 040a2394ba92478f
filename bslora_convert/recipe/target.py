"""What the result must reach: a behaviour, an error, a size or ranks, exactly one of them.

Asked     as the options say it: sizes as shares of a source that nobody has looked at yet
Target    the same for one source, in absolute terms; it is resolved once, and everything below takes it as it is
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Self

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_share, is_number, is_whole
from bslora_convert.recipe.measures import ON_PROMPTS, Measure
from bslora_convert.recipe.options import TARGET, option
from bslora_convert.recipe.structure import LARGEST_RANK

DEFAULT_ERROR = 0.1
RankTriple = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Asked:
    """One of these; `max_error` is 0.1 where none is given, and then the nearest error will do where 0.1 can't be reached.

    min_retention, max_kl, min_agreement: behaviour of the smallest result, as `verify` measures it, on held-out rows.
    max_error: relative error of the smallest result. bytes: share of the source's file. For all of these, rank and precision are
    chosen together. budget: share of the LoRA's parameters. ranks: local, intra and inter rank by hand. Both in floats, unless
    bits are given.
    is_given: whether one was given.

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
    ranks: RankTriple | None = option(
        None, "Set the local, intra and inter rank by hand, in floats.", TARGET, metavar="L,A,E"
    )
    is_given: bool = field(default=True, init=False, compare=False)

    @property
    def option(self) -> str:
        """The name of the one that is given."""
        return next(name for name in TARGETS if getattr(self, name) is not None)

    @property
    def measure(self) -> Measure | None:
        """The measure of behaviour that is asked for; None for an error or a size."""
        return ON_PROMPTS.get(self.option)

    @property
    def chooses_precision(self) -> bool:
        """Whether rank and precision are chosen together, so that numbers are stored in codes."""
        return self.budget is None and self.ranks is None

    def __post_init__(self) -> None:
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{given[0]} and {given[1]} exclude each other: give one of them", *given[:2])
        if not given:
            object.__setattr__(self, "max_error", DEFAULT_ERROR)
            object.__setattr__(self, "is_given", False)
        check_share("min_retention", self.min_retention, "a share of the adapter's effect", one=False)
        check_share("min_agreement", self.min_agreement, "a share of the tokens", one=False)
        if self.max_kl is not None and not (is_number(self.max_kl) and 0 < self.max_kl < math.inf):
            raise RecipeError(f"max_kl is {self.max_kl!r}: a number of nats above 0 is allowed", "max_kl")
        check_share("budget", self.budget, "a share of the parameters")
        check_share("max_error", self.max_error, "a relative error", one=False)
        check_share("bytes", self.bytes, "a share of the source's file")
        if self.ranks is not None:
            object.__setattr__(self, "ranks", _triple(self.ranks))


TARGETS = tuple(one.name for one in fields(Asked) if one.init)


@dataclass(frozen=True, slots=True)
class Target:
    """What the result of one source must reach; one of error, bytes, numbers, ranks and measure is given.

    error: relative error of the weights. bytes: of the weight file. numbers: stored floats. ranks: local, intra and inter.
    measure, limit: a behaviour on held-out rows. or_nearest: where the error can't be reached, the nearest result will do.
    width: one width for every coded number; None where widths are allocated. unbiased: every update as strong as the original's.
    most_rank: greatest expanded rank of a module; None for any.
    """

    error: float | None = None
    bytes: int | None = None
    numbers: int | None = None
    ranks: RankTriple | None = None
    measure: Measure | None = None
    limit: float = math.nan
    or_nearest: bool = False
    width: int | None = None
    unbiased: bool = True
    most_rank: int | None = None

    @property
    def chooses_ranks(self) -> bool:
        """Whether local ranks are chosen together with widths."""
        return self.numbers is None and self.ranks is None

    @property
    def is_coded(self) -> bool:
        """Whether numbers are stored in codes."""
        return self.chooses_ranks or self.width is not None

    def of_bytes(self, size: int) -> Self:
        """The same for a file of so many bytes: a step on the way to a behaviour."""
        return replace(self, bytes=size, error=None, numbers=None, ranks=None, measure=None, limit=math.nan)


def resolved(asked: Asked, parameters: int, file_bytes: int) -> Target:
    """What was asked for, of a source of so many numbers in a file of so many bytes."""
    if asked.measure is not None:
        return Target(measure=asked.measure, limit=getattr(asked, asked.option))
    if asked.bytes is not None:
        return Target(bytes=math.floor(asked.bytes * file_bytes))
    if asked.budget is not None:
        return Target(numbers=math.floor(asked.budget * parameters))
    return Target(error=asked.max_error, ranks=asked.ranks, or_nearest=not asked.is_given)


def asked_in(recipe: Mapping[str, object]) -> dict[str, object]:
    """The target's option among those of a recipe, as a record shows what was asked for."""
    return {name: recipe[name] for name in TARGETS if recipe.get(name) is not None}


def _triple(given: object) -> RankTriple:
    ranks = tuple(given) if isinstance(given, tuple | list) else ()
    if len(ranks) != 3 or not all(is_whole(rank) and 0 <= rank <= LARGEST_RANK for rank in ranks):
        raise RecipeError(
            f"ranks is {given!r}: three whole numbers local,intra,inter from 0 to {LARGEST_RANK} are allowed", "ranks"
        )
    if not any(ranks):
        raise RecipeError("ranks is 0,0,0: at least one part needs a rank above 0", "ranks")
    return ranks
