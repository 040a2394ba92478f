"""Where words go: consoles that print what they are given, letter by letter, as wide as it is where nobody looks at a screen."""

import io
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

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


def table(left: Sequence[str], right: Sequence[str] = (), title: str | None = None) -> "Table":
    """An empty table: columns of words, of which the first stays on one line, then columns of numbers."""
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for place, column in enumerate(left):
        made.add_column(column, no_wrap=place == 0)
    for column in right:
        made.add_column(column, justify="right")
    return made


def show_failed(console: "Console", rows: Sequence[Mapping[str, Any]]) -> None:
    """Why adapters of a library were left out, a line each."""
    for row in rows:
        if row["status"] not in ("ok", "skipped"):
            console.print(f"{row['id']}: {row['message']}", style="yellow", soft_wrap=True)
