"""Docstrings here may name two errors on one line; the reader of docstrings wants one a line. `mkdocs.yml` names this file."""

import re
from typing import Any

import griffe

AGAIN = re.compile(r"(?<=\S) (?=:raises )")


class OneALine(griffe.Extension):
    """Breaks the line before each `:raises`."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Is called for every object that was read."""
        if obj.docstring:
            obj.docstring.value = AGAIN.sub("\n", obj.docstring.value)
