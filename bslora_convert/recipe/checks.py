"""How a value of an option is checked: a wrong one is named with its option and with what is allowed."""

import math
from collections.abc import Collection
from typing import TypeGuard

from bslora_convert.errors import RecipeError


def check_choice(field: str, value: object, allowed: Collection[str]) -> None:
    """:raises RecipeError: when the value is none of those allowed."""
    if value not in allowed:
        raise RecipeError(f"{field} is {value!r}: one of {', '.join(allowed)} is allowed", field)


def check_whole(field: str, value: object, low: int, high: int) -> None:
    """:raises RecipeError: when the value is given and no whole number of this range."""
    if value is not None and not (is_whole(value) and low <= value <= high):
        raise RecipeError(f"{field} is {value!r}: a whole number from {low} to {high} is allowed", field)


def check_count(field: str, value: object) -> None:
    """:raises RecipeError: when the value is given and no whole number from one on."""
    if value is not None and not (is_whole(value) and value >= 1):
        raise RecipeError(f"{field} is {value!r}: a positive whole number is allowed", field)


def check_on_base(base_model: object, prompts: object) -> None:
    """:raises RecipeError: when one of what a measurement of behaviour needs is given without the other."""
    if (base_model is None) != (prompts is None):
        raise RecipeError("base_model and prompts are given together or not at all", "base_model", "prompts")


def check_share(field: str, value: object, of: str, *, one: bool = True) -> None:
    """one: whether the whole is allowed. :raises RecipeError: when the value is given and no share."""
    if value is None:
        return
    good = is_number(value) and value > 0 and (value <= 1 if one else value < 1)
    if not good:
        raise RecipeError(f"{field} is {value!r}: {of}, 0 < {field} {'<=' if one else '<'} 1, is allowed", field)


def is_whole(value: object) -> TypeGuard[int]:
    """Whether a value is a whole number and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
