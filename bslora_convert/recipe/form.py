"""The form of the result: which transform, who shares with whom, which ranks it may have."""

from dataclasses import dataclass

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice, check_whole

TRANSFORM_NAMES = ("ke", "gt", "ss", "none", "auto")
WINDOW_NAMES = ("center", "top-left", "bottom-right")
KERNEL_NAMES = ("r_1", "1_r", "2_r")
LOCAL_RANKS = ("uniform", "adaptive")
LARGEST_RANK = 4096


@dataclass(frozen=True, slots=True)
class Form:
    """transform and its own settings.

    min_shared: least rank of each shared part that the search may choose; 1 for ke, gt and ss by name, else 0, unless it is set.
    local_ranks: one rank for all modules, or ranks where they buy most; None leaves it to the aim, which is uniform for ranks by
    hand and adaptive else.
    groups: `layer`, `auto` or a file of groups: who shares on the intra level.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    transform: str = "ke"
    min_shared: int | None = None
    shared_size: int | None = None
    slice: str = "center"
    kernel: str = "r_1"
    local_ranks: str | None = None
    groups: str = "layer"

    def __post_init__(self) -> None:
        check_choice("transform", self.transform, TRANSFORM_NAMES)
        check_choice("slice", self.slice, WINDOW_NAMES)
        check_choice("kernel", self.kernel, KERNEL_NAMES)
        if self.local_ranks is not None:
            check_choice("local_ranks", self.local_ranks, LOCAL_RANKS)
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
