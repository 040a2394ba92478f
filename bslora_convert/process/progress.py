"""How long work says where it is; who shows it is the caller's business.

A step names a phase; what follows ": " in it are words that change while the phase goes on, as in "training: loss 0.12".
"""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # step, done, total (0 = unknown)


def silent(step: str, done: int, total: int) -> None:
    """Says nothing."""


def phase_of(step: str) -> tuple[str, str]:
    """`training: loss 0.12` -> ("training", "loss 0.12")."""
    phase, _, words = step.partition(": ")
    return phase, words
