"""Every option of a distillation, checked once."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice, check_count

OPTIONS = (
    "train", "max_steps", "epochs", "max_minutes", "learning_rate", "batch_size", "accumulate", "temperature",
    "hidden_weight", "max_length", "evaluate_every", "patience",
)  # fmt: skip
TRAINED = ("local", "shared", "all")


@dataclass(frozen=True, slots=True)
class Training:
    """How to distil.

    Whichever of `max_steps`, `epochs` and `max_minutes` comes first ends it; so do `patience` evaluations without a better
    state.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    train: str = "local"
    max_steps: int | None = None
    epochs: float = 1.0
    max_minutes: float | None = None
    learning_rate: float = 5e-4
    warmup: float = 0.1
    batch_size: int = 8
    accumulate: int = 1
    temperature: float = 1.0
    hidden_weight: float = 0.0
    clip: float = 1.0
    max_length: int | None = None
    heldout: float = 0.1
    max_heldout: int = 32
    evaluate_every: int = 20
    patience: int = 8
    chat_template: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("train", self.train, TRAINED)
        least = {
            "max_steps": 0, "epochs": 0, "max_minutes": 0, "learning_rate": 0, "temperature": 0, "clip": 0,
        }  # fmt: skip
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > bound):
                raise RecipeError(f"{name} is {value}: a number above {bound} is allowed", name)
        for name in ("batch_size", "accumulate", "max_length", "max_heldout", "evaluate_every", "patience"):
            check_count(name, getattr(self, name))
        for name in ("warmup", "heldout"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}: a share from 0 to below 1 is allowed", name)
        if self.hidden_weight < 0:
            raise RecipeError(f"hidden_weight is {self.hidden_weight}: zero or more is allowed", "hidden_weight")

    def to_dict(self) -> dict[str, Any]:
        """Every option by name."""
        return asdict(self)

    def arguments(self) -> list[str]:
        """The command-line options that say the same, those at their default left out."""
        plain = Training()
        return [
            word
            for name, value in self.to_dict().items()
            if name in OPTIONS and value != getattr(plain, name)
            for word in (f"--{name.replace('_', '-')}", f"{value}")
        ]

    def rate_at(self, share: float) -> float:
        """Learning rate at a share of the run: linear warm-up, then half a cosine down to a hundredth."""
        if share < self.warmup:
            return self.learning_rate * share / self.warmup
        rest = (min(share, 1.0) - self.warmup) / (1 - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * rest)))
