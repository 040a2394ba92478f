"""The metadata of a model card, of which a few fields are carried on to what is made of the model.

A card begins with YAML between two lines of `---`, and of YAML only what cards are written in is read: a word or a quoted text, a
list in brackets, a list of lines. Anything else in it is left where it is.
"""

import re
from pathlib import Path

from bslora_convert.files.jsonfile import LFS_POINTER

CARD_NAME = "README.md"
CARRIED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "tags")
LARGEST, LONGEST, MOST = 1 << 20, 200, 64  # bytes of a card, letters of a value, values of a list
FIELD = re.compile(r"(?P<name>[a-z_]+):\s*(?P<value>.*)")
PLAIN = re.compile(r"[\w./:+@() -]+")
Metadata = dict[str, str | list[str]]


def carried(directory: Path) -> Metadata:
    """The fields of a source's card that are carried on; none where it has no card, or none that is understood."""
    path = directory / CARD_NAME
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return {}
        text = path.read_bytes()
    except OSError:
        return {}
    if text.startswith(LFS_POINTER):
        return {}
    lines = text.decode("utf-8", "replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: Metadata = {}
    held: list[str] | None = None  # the list whose lines are read
    for line in lines[1:]:
        if line.strip() == "---":
            return {name: value for name, value in found.items() if value}
        item = re.fullmatch(r"\s*-\s+(.*)", line)
        if item is not None and held is not None:
            _add(held, item[1])
            continue
        held = None
        match = FIELD.fullmatch(line)
        if match is None or match["name"] not in CARRIED:
            continue
        value = match["value"].strip()
        if not value or value.startswith("["):
            held = []
            found[match["name"]] = held
            for part in value.strip("[]").split(",") if value.endswith("]") else ():
                _add(held, part)
        elif (text_ := _text(value)) is not None:
            found[match["name"]] = text_
    return {}  # it never ended


def _add(held: list[str], value: str) -> None:
    text = _text(value)
    if text is not None and len(held) < MOST:
        held.append(text)


def _text(value: str) -> str | None:
    """A word or a quoted text; None for anything else."""
    value = value.strip()
    if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
        value = value[1:-1]
    return value if PLAIN.fullmatch(value) and len(value) <= LONGEST else None
