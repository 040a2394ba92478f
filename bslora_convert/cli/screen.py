"""Where words go: consoles that print what they are given, letter by letter, as wide as it is where nobody looks at a screen."""

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

UNBOUNDED = 100_000  # columns: what is piped is read by programs, which want a line to stay one


def take_any_path() -> None:
    """Paths that are no UTF-8 are printed by their numbers instead of ending a verb whose work is done."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def console(stderr: bool = False) -> "Console":
    """A console without markup, emoji and highlighting: paths hold brackets and colons of their own."""
    from rich.console import Console

    made = Console(file=sys.stderr if stderr else sys.stdout, markup=False, emoji=False, highlight=False)
    if not made.file.isatty():
        made.width = UNBOUNDED
    return made
