"""Every option of a distillation, checked once."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_choice, check_count, is_number
from bslora_convert.recipe.options import RUNNING, option, options_of
from bslora_convert.recipe.options import TRAINING as SECTION

TRAINED = ("local", "shared", "all")
FILE: dict[str, Any] = {"verbs": ()}  # the recipe file alone
BY_NAME: dict[str, Any] = {"verbs": ("finetune",)}  # the verb of that name, and the recipe file

WHOLE = (
    "max_steps", "batch_size", "accumulate", "limit", "max_length", "max_new_tokens", "max_heldout", "evaluate_every", "patience",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Training:
    """How to distil, and how the rows of its prompt files are read.

    Whichever of `max_steps`, `epochs` and `max_minutes` comes first ends it; so do `patience` evaluations without a better
    state.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    train: str = option("local", "Choose which parts are trained.", SECTION, choices=TRAINED)
    max_steps: int | None = option(None, "Stop after this many steps.", SECTION)
    epochs: float = option(1.0, "Stop after this many passes over the rows.", SECTION, **BY_NAME)
    max_minutes: float | None = option(None, "Stop after this many minutes, everything counted.", SECTION)
    learning_rate: float = option(5e-4, "Set the highest learning rate.", SECTION)
    warmup: float = option(0.1, "Raise the learning rate over this share of the run.", SECTION, **FILE)
    batch_size: int = option(8, "Run this many rows at once.", SECTION, **FILE)
    accumulate: int = option(1, "Add up the gradients of this many batches a step.", SECTION, **FILE)
    temperature: float = option(1.0, "Divide both models' logits by this in the loss.", SECTION, **FILE)
    hidden_weight: float = option(
        0.0, "Add the error of the last hidden states to the loss with this weight.", SECTION, **FILE
    )
    clip: float = option(1.0, "Limit the norm of the gradient.", SECTION, **FILE)
    limit: int | None = option(None, "Read the first rows of each prompt file only.", SECTION, usual="all", **FILE)
    max_length: int | None = option(None, "Cut rows to this many tokens.", SECTION, usual="the model's context", **FILE)
    max_new_tokens: int = option(128, "Limit completions that the original writes, in tokens.", SECTION, **FILE)
    chat_template: bool = option(True, "Read prompts as a user's turn of the chat template.", SECTION, **FILE)
    heldout: float = option(
        0.1, "Hold this share of the rows out to choose the state that is kept.", SECTION, **BY_NAME
    )
    max_heldout: int = option(32, "Hold out at most this many rows.", SECTION, **FILE)
    evaluate_every: int = option(20, "Measure the held-out rows after every so many steps.", SECTION, **FILE)
    patience: int = option(8, "Stop after this many measurements without a better state.", SECTION, **FILE)
    seed: int = option(
        0, "Draw random numbers from this; the same seed gives the same result on a CPU.", RUNNING, **BY_NAME
    )

    def __post_init__(self) -> None:
        check_choice("train", self.train, TRAINED)
        for name in (
            "epochs",
            "max_minutes",
            "learning_rate",
            "temperature",
            "clip",
            "warmup",
            "heldout",
            "hidden_weight",
        ):
            value = getattr(self, name)
            if value is not None and not is_number(value):
                raise RecipeError(f"{name} is {value!r}: a finite number is allowed", name)
        if not isinstance(self.chat_template, bool):
            raise RecipeError(f"chat_template is {self.chat_template!r}: true or false is allowed", "chat_template")
        for name in ("epochs", "max_minutes", "learning_rate", "temperature", "clip"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise RecipeError(f"{name} is {value}: a number above 0 is allowed", name)
        for name in WHOLE:
            check_count(name, getattr(self, name))
        for name in ("warmup", "heldout"):
            if not 0 <= getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}: a share from 0 to below 1 is allowed", name)
        if self.hidden_weight < 0:
            raise RecipeError(f"hidden_weight is {self.hidden_weight}: zero or more is allowed", "hidden_weight")

    def to_dict(self) -> dict[str, Any]:
        """Every option by name."""
        return asdict(self)

    @property
    def reading(self) -> dict[str, Any]:
        """How prompt files are read, as `Prompts.read` takes it."""
        names = ("limit", "max_length", "max_new_tokens", "chat_template", "batch_size")
        return {name: getattr(self, name) for name in names}

    def given(self) -> dict[str, Any]:
        """The options that are not at their default; the seed is the recipe's."""
        return {
            one.name: value
            for one in fields(self)
            if (value := getattr(self, one.name)) != one.default and one.name != "seed"
        }

    def steps_over(self, rows: int) -> int:
        """Optimiser steps that a run on so many rows takes at most."""
        planned = max(1, round(self.epochs * max(1, math.ceil(rows / (self.batch_size * self.accumulate)))))
        return min(planned, self.max_steps) if self.max_steps else planned

    def rate_at(self, share: float) -> float:
        """Learning rate at a share of the run: linear warm-up, then half a cosine down to a hundredth."""
        if share < self.warmup:
            return self.learning_rate * share / self.warmup
        rest = (min(share, 1.0) - self.warmup) / (1 - self.warmup)
        return self.learning_rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * rest)))


OPTIONS = tuple(
    name for name in options_of(Training) if name != "seed"
)  # in a recipe's file, whose seed is the training's too
