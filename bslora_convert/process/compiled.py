"""Loops over numbers that are compiled by numba, once, and kept beside the package where that can be written to."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, TypeVar

Loop = TypeVar("Loop", bound=Callable[..., Any])


def compiled(loop: Loop) -> Loop:
    """The loop in machine code; other threads run beside it."""
    from numba import njit

    found: Any
    try:
        found = njit(nogil=True, cache=True)(loop)
    except RuntimeError:  # no place to keep it
        found = njit(nogil=True)(loop)
    return found  # type: ignore[no-any-return]


def can_compile() -> bool:
    """Whether numba is there; a server that only reads does without."""
    return find_spec("numba") is not None
