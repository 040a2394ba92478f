"""Memory that was freed goes back to the system: an allocator keeps it for whoever asks next, in pieces that nobody may fit."""

import ctypes
from collections.abc import Callable
from functools import cache


def give_back() -> None:
    """Does so where the C library can; milliseconds."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # no glibc
        return None
