"""Every option of a conversion, checked once."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from bslora_convert.bslora.coding.widths import WIDTHS
from bslora_convert.errors import RecipeError

TRANSFORM_NAMES = ("ke", "gt", "ss", "none", "auto")
WINDOW_NAMES = ("center", "top-left", "bottom-right")
KERNEL_NAMES = ("r_1", "1_r", "2_r")
LOCAL_RANKS = ("uniform", "adaptive")
DTYPES = ("auto", "float32", "bfloat16", "float16")
FORMATS = ("lora", "official")  # what `expand` writes
METRICS = ("input", "two-sided")
DEFAULT_BUDGET = 0.4459  # the paper's share of LoRA's parameters, the mean over its models and transforms
LARGEST_RANK = 4096


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to convert one adapter.

    Exactly one of `budget`, `ranks`, `bytes` and `max_error` decides the size, though `bytes` may stand beside `max_error`;
    `budget` is 0.4459 where none is given. `bytes` is a share of the source's file that rank and precision are chosen for
    together, `bits` codes everything in one width.
    `calibration` and `finetune` are prompt files; they need `base_model`.
    `groups` is `layer`, `auto` or a file of groups: who shares on the intra level.
    `lora_alpha` and `use_rslora` are the source's scaling where its configuration lacks them.
    `local_ranks` is adaptive for a budget or an error, uniform for ranks given by hand, unless it is set.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    transform: str = "ke"
    budget: float | None = None
    ranks: tuple[int, int, int] | None = None
    max_error: float | None = None
    bytes: float | None = None
    bits: int | None = None
    min_shared: int | None = None
    shared_size: int | None = None
    slice: str = "center"
    kernel: str = "r_1"
    local_ranks: str | None = None
    dtype: str = "auto"
    base_model: str | None = None
    calibration: str | None = None
    metric: str = "input"
    groups: str = "layer"
    finetune: str | None = None
    device: str = "auto"
    seed: int = 0
    lora_alpha: float | None = None
    use_rslora: bool | None = None

    def __post_init__(self) -> None:
        for field, allowed in (
            ("transform", TRANSFORM_NAMES),
            ("slice", WINDOW_NAMES),
            ("kernel", KERNEL_NAMES),
            ("dtype", DTYPES),
            ("metric", METRICS),
        ):
            _choice(field, getattr(self, field), allowed)
        if self.local_ranks is not None:
            _choice("local_ranks", self.local_ranks, LOCAL_RANKS)
        sizes = [name for name in ("budget", "ranks", "max_error") if getattr(self, name) is not None]
        if self.bytes is not None:
            sizes = ["bytes", *(name for name in sizes if name != "max_error")]
        if len(sizes) > 1:
            raise RecipeError(f"{sizes[0]} and {sizes[1]} exclude each other: give one of them", *sizes[:2])
        if not sizes:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
        self._check_numbers()
        self._check_device()
        if self.groups != "layer" and self.transform in ("gt", "none"):
            raise RecipeError(
                f"groups is {self.groups!r}: with transform {self.transform} nothing is shared among modules",
                "groups",
                "transform",
            )
        if self.slice != "center" and self.transform not in ("ss", "auto"):
            raise RecipeError(
                f"slice is {self.slice!r}: with transform {self.transform} there are no windows", "slice", "transform"
            )
        if self.kernel != "r_1" and self.transform not in ("ke", "auto"):
            raise RecipeError(
                f"kernel is {self.kernel!r}: with transform {self.transform} there are no kernels",
                "kernel",
                "transform",
            )
        if self.metric != "input" and self.calibration is None:
            raise RecipeError(
                f"metric is {self.metric!r}: it is taken on prompts, so give calibration", "metric", "calibration"
            )
        self._check_coding()
        prompts = [name for name in ("calibration", "finetune") if getattr(self, name) is not None]
        if prompts and self.base_model is None:
            raise RecipeError(f"{prompts[0]} needs the base model: give base_model", prompts[0], "base_model")
        if self.base_model is not None and not prompts:
            raise RecipeError(
                "base_model is used by calibration and finetune only: give one of them a prompt file",
                "base_model",
                "calibration",
                "finetune",
            )
        if self.local_ranks is None:
            object.__setattr__(self, "local_ranks", "uniform" if self.ranks else "adaptive")
        if self.min_shared and self.transform == "none":
            raise RecipeError(f"min_shared is {self.min_shared}: with transform none nothing is shared", "min_shared")
        if self.min_shared is None:
            object.__setattr__(self, "min_shared", 0 if self.transform in ("auto", "none") else 1)

    @property
    def scaling(self) -> dict[str, Any]:
        """What `load_lora` is told of the source's scaling."""
        return {"alpha": self.lora_alpha, "rslora": self.use_rslora}

    @property
    def is_coded(self) -> bool:
        """Whether numbers are stored in codes."""
        return self.bytes is not None or self.bits is not None

    def _check_coding(self) -> None:
        if self.bytes is not None and not (_is_number(self.bytes) and 0 < self.bytes <= 1):
            raise RecipeError(
                f"bytes is {self.bytes!r}: a share of the source's file, 0 < bytes <= 1, is allowed", "bytes"
            )
        if self.bytes is not None and self.local_ranks == "uniform":
            raise RecipeError(
                "local_ranks is 'uniform': with bytes every module's rank is chosen; adaptive is allowed",
                "local_ranks",
                "bytes",
            )
        if self.bits is not None and self.bits not in WIDTHS:
            raise RecipeError(f"bits is {self.bits!r}: one of {', '.join(map(str, WIDTHS))} is allowed", "bits")

    def _check_numbers(self) -> None:
        if self.budget is not None and not (_is_number(self.budget) and 0 < self.budget <= 1):
            raise RecipeError(
                f"budget is {self.budget!r}: a share of the parameters, 0 < budget <= 1, is allowed", "budget"
            )
        if self.max_error is not None and not (_is_number(self.max_error) and 0 < self.max_error < 1):
            raise RecipeError(
                f"max_error is {self.max_error!r}: a relative error, 0 < max_error < 1, is allowed", "max_error"
            )
        if self.lora_alpha is not None and not _is_number(self.lora_alpha):
            raise RecipeError(f"lora_alpha is {self.lora_alpha!r}: a finite number is allowed", "lora_alpha")
        if self.use_rslora not in (None, True, False):
            raise RecipeError(f"use_rslora is {self.use_rslora!r}: true or false is allowed", "use_rslora")
        if self.ranks is not None:
            ranks = tuple(self.ranks)
            if len(ranks) != 3 or not all(_is_whole(rank) and 0 <= rank <= LARGEST_RANK for rank in ranks):
                raise RecipeError(
                    f"ranks is {self.ranks!r}: three whole numbers local,intra,inter from 0 to {LARGEST_RANK} are allowed",
                    "ranks",
                )
            if not any(ranks):
                raise RecipeError("ranks is 0,0,0: at least one part needs a rank above 0", "ranks")
            if self.transform == "auto":
                raise RecipeError("ranks: given by hand they need a transform by name, not auto", "ranks")
            if self.transform == "none" and any(ranks[1:]):
                raise RecipeError(
                    f"ranks is {self.ranks!r}: with transform none only L,0,0 is allowed", "ranks", "transform"
                )
            object.__setattr__(self, "ranks", ranks)
        for field, low, high in (
            ("min_shared", 0, LARGEST_RANK),
            ("shared_size", 1, 1 << 20),
            ("seed", 0, (1 << 63) - 1),
        ):
            value = getattr(self, field)
            if value is not None and not (_is_whole(value) and low <= value <= high):
                raise RecipeError(f"{field} is {value!r}: a whole number from {low} to {high} is allowed", field)
        if self.shared_size is not None and self.transform in ("ss", "none"):
            raise RecipeError(
                f"shared_size is {self.shared_size}: with transform {self.transform} it has no meaning "
                "(slices take the largest module's size)",
                "shared_size",
                "transform",
            )

    def _check_device(self) -> None:
        kind, _, number = self.device.partition(":")
        if kind not in ("auto", "cpu", "cuda") or (number and (kind != "cuda" or not number.isdigit())):
            raise RecipeError(f"device is {self.device!r}: auto, cpu, cuda or cuda:N is allowed", "device")

    def to_dict(self) -> dict[str, Any]:
        """Every option as used, as JSON holds it."""
        values = asdict(self)
        values["ranks"] = list(self.ranks) if self.ranks else None
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Recipe":
        """The recipe that `to_dict` wrote.

        :raises RecipeError: for a field that is not known.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise RecipeError(f"{sorted(unknown)[0]} is no option of a recipe")
        ranks = values.get("ranks")
        return cls(**{**values, "ranks": tuple(ranks) if ranks is not None else None})

    def arguments(self) -> list[str]:
        """The command-line options that say the same, those at their default left out."""
        plain = Recipe(
            transform=self.transform, ranks=self.ranks, max_error=self.max_error, budget=self.budget, bytes=self.bytes
        )
        words = ["--transform", self.transform]
        for field in fields(self):
            value = getattr(self, field.name)
            sizes = field.name in ("budget", "ranks", "max_error", "bytes")
            if field.name == "transform" or value is None or (not sizes and value == getattr(plain, field.name)):
                continue
            text = ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
            words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [text])]
        return words


def _choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RecipeError(f"{field} is {value!r}: one of {', '.join(allowed)} is allowed", field)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
