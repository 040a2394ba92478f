"""How templates are filled: what is escaped, and how numbers are written. Nothing here draws, so that cards load no plots."""

import re
from functools import cache
from typing import Any

import jinja2

from bslora_convert.behaviour.intervals import too_few


@cache
def environment() -> jinja2.Environment:
    """Jinja environment of the package's templates; everything is escaped in HTML, and in Markdown what passes `plain`."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("bslora_convert.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_encodable,
    )
    made.filters["plain"] = plain
    made.filters["sentence"] = lambda text: text[:1].upper() + text[1:]
    made.tests["few"] = too_few
    made.filters["words"] = lambda name: name.replace("_", " ")
    made.filters["percent"] = lambda value: f"{value:.2%}"
    made.filters["count"] = lambda value: f"{value:,}"
    made.filters["size"] = size
    return made


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def _encodable(value: Any) -> Any:
    """Names of files are bytes to the system; those that are no UTF-8 are shown by their numbers."""
    return value.encode("utf-8", "backslashreplace").decode() if type(value) is str else value


def size(count: float) -> str:
    """Bytes for a reader: 9.8 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError
