"""How long work says where it is; who shows it is the caller's business."""

from typing import Protocol


class Progress(Protocol):
    """Is told where the work is.

    phase: what is being done, the same text for as long as it goes on. done, total: how much of it; a total of 0 is unknown.
    words: what changes while the phase goes on, such as `loss 0.12`.
    """

    def __call__(self, phase: str, /, done: int = 0, total: int = 0, words: str = "") -> None:
        """Says where it is now."""


def silent(phase: str, /, done: int = 0, total: int = 0, words: str = "") -> None:
    """Says nothing."""
