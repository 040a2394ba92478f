"""The structure of the result: which transform, who shares with whom, which ranks it may have."""

from dataclasses import dataclass, replace
from typing import Self

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice, check_whole, is_whole
from bslora_convert.recipe.options import FORM, option

TRANSFORM_NAMES = ("auto", "ke", "gt", "ss", "none")
WINDOW_NAMES = ("center", "top-left", "bottom-right")
KERNEL_NAMES = ("r_1", "1_r", "2_r")
LOCAL_RANKS = ("uniform", "adaptive")
LARGEST_RANK = 4096


@dataclass(frozen=True, slots=True)
class Structure:
    """transform and its own settings.

    min_shared: least rank of each shared part that the search may choose; 1 for ke, gt and ss by name, else 0, unless it is set.
    local_ranks: one rank for all modules, or ranks where they buy most; None is uniform for ranks by hand and adaptive otherwise
    (`Recipe` decides).
    max_rank: greatest expanded rank of a module: a number, `slot` for the slot that the source takes on a server, `none`. None is
    slot, but none where ranks are given by hand.
    groups: `layer`, `auto` or a file of groups: who shares on the intra level.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    transform: str = option(
        "auto",
        "Choose how shared factors take a module's shape; none = plain SVD, auto = the best for what is asked.",
        FORM, choices=TRANSFORM_NAMES,
    )  # fmt: skip
    min_shared: int | None = option(
        None, "Give each shared part at least this rank.", FORM, verbs=(), usual="1 for ke, gt and ss, 0 for auto"
    )
    shared_size: int | None = option(
        None, "Set the rows and columns of the shared factors.", FORM, verbs=(),
        usual="256 for ke, 1024 for gt, cut to what divides or fits",
    )  # fmt: skip
    slice: str = option("center", "Choose the window of ss.", FORM, choices=WINDOW_NAMES, verbs=())
    kernel: str = option("r_1", "Choose the variant of ke.", FORM, choices=KERNEL_NAMES, verbs=())
    local_ranks: str | None = option(
        None, "Give all modules one local rank, or ranks where they gain most.", FORM, choices=LOCAL_RANKS, verbs=(),
        usual="adaptive; uniform with ranks",
    )  # fmt: skip
    groups: str = option(
        "layer", "Choose who shares the intra pairs: layer, auto (clusters) or a JSON file of groups.", FORM, verbs=()
    )
    max_rank: int | str | None = option(
        None, "Limit the expanded rank of every module; slot = the source's own server slot.", FORM,
        metavar="N|slot|none", usual="slot; none with --ranks",
    )  # fmt: skip

    def __post_init__(self) -> None:
        check_choice("transform", self.transform, TRANSFORM_NAMES)
        check_choice("slice", self.slice, WINDOW_NAMES)
        check_choice("kernel", self.kernel, KERNEL_NAMES)
        if self.local_ranks is not None:
            check_choice("local_ranks", self.local_ranks, LOCAL_RANKS)
        if self.max_rank not in (None, "slot", "none"):
            if isinstance(self.max_rank, str) and self.max_rank.isdigit():
                object.__setattr__(self, "max_rank", int(self.max_rank))
            if not (is_whole(self.max_rank) and 1 <= self.max_rank <= LARGEST_RANK):
                raise RecipeError(
                    f"max_rank is {self.max_rank!r}: slot, none or a whole number from 1 to {LARGEST_RANK} is allowed",
                    "max_rank",
                )
        if not isinstance(self.groups, str):
            raise RecipeError(
                f"groups is {self.groups!r}: layer, auto or the path of a file of groups is allowed", "groups"
            )
        check_whole("min_shared", self.min_shared, 0, LARGEST_RANK)
        check_whole("shared_size", self.shared_size, 1, 1 << 20)
        for field, value, plain, of, what in (
            ("groups", self.groups, "layer", ("ke", "ss", "auto"), "nothing is shared among modules"),
            ("slice", self.slice, "center", ("ss", "auto"), "there are no windows"),
            ("kernel", self.kernel, "r_1", ("ke", "auto"), "there are no kernels"),
            ("shared_size", self.shared_size, None, ("ke", "gt", "auto"), "it has no meaning"),
            ("min_shared", self.min_shared or None, None, ("ke", "ss", "gt", "auto"), "nothing is shared"),
        ):
            if value != plain and self.transform not in of:
                raise RecipeError(f"{field} is {value!r}: with transform {self.transform} {what}", field, "transform")
        if self.min_shared is None:
            object.__setattr__(self, "min_shared", 0 if self.transform in ("auto", "none") else 1)

    @property
    def is_uniform(self) -> bool:
        """Whether all modules get one local rank."""
        return self.local_ranks == "uniform"

    @property
    def most_rank(self) -> int | None:
        """Greatest expanded rank of a module, None for any; `slot` must have been replaced by a number (`in_slot`)."""
        assert self.max_rank != "slot"  # whoever knows the source replaces it
        return self.max_rank if isinstance(self.max_rank, int) else None

    def in_slot(self, slot: int | None) -> Self:
        """The same with the rank of the source's server slot in place of `slot`; None where no slot holds the source."""
        return self if self.max_rank != "slot" else replace(self, max_rank="none" if slot is None else slot)

    def each(self) -> list[Self]:
        """What `auto` chooses from, otherwise this one; settings that mean nothing to a transform are left out there."""
        if self.transform != "auto":
            return [self]
        plain = replace(
            self, transform="none", groups="layer", shared_size=None, min_shared=0, slice="center", kernel="r_1"
        )
        return [plain, self.of("ke"), self.of("ss")]

    def of(self, transform: str) -> Self:
        """The same with `ke` or `ss` in place of `auto`."""
        if transform == "ke":
            return replace(self, transform="ke", slice="center")
        return replace(self, transform="ss", shared_size=None, kernel="r_1")
