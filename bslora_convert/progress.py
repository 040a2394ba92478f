"""How long work says where it is; who shows it is the caller's business."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # step, done, total (0 = unknown)


def silent(step: str, done: int, total: int) -> None:
    """Says nothing."""
