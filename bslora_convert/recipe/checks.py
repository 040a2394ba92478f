"""How a value of an option is checked: a wrong one is named with its option and with what is allowed."""

import math

from bslora_convert.errors import RecipeError


def check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    """:raises RecipeError: when the value is none of those allowed."""
    if value not in allowed:
        raise RecipeError(f"{field} is {value!r}: one of {', '.join(allowed)} is allowed", field)


def check_whole(field: str, value: object, low: int, high: int) -> None:
    """:raises RecipeError: when the value is given and no whole number of this range."""
    if value is not None and not (is_whole(value) and low <= value <= high):  # type: ignore[operator]
        raise RecipeError(f"{field} is {value!r}: a whole number from {low} to {high} is allowed", field)


def check_share(field: str, value: object, of: str, *, one: bool = True) -> None:
    """one: whether the whole is allowed. :raises RecipeError: when the value is given and no share."""
    if value is None:
        return
    good = is_number(value) and value > 0 and (value <= 1 if one else value < 1)  # type: ignore[operator]
    if not good:
        raise RecipeError(f"{field} is {value!r}: {of}, 0 < {field} {'<=' if one else '<'} 1, is allowed", field)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number and no truth value."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a finite number and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
