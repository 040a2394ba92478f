"""Texts and records without the places of this machine: what a thing is called stays, where it lay does not."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from bslora_convert.files.remote import LOCAL
from bslora_convert.files.store import is_url, parts_of

# An absolute path in a text: of a disk (`/a/b`, `~/a`), of Windows (`C:\a`), of a share (`\\server\a`).
ABSOLUTE = re.compile(r"(?<![\w/:.~\\])(?:~?/[^\s/,;:'\"()]+(?:/[^\s/,;:'\"()]+)*/?|(?:[A-Za-z]:|\\)\\[^\s,;:'\"()]+)")
PLACES = frozenset({
    "path", "uri", "prompts", "finetune", "base_model", "base_model_name_or_path", "name_or_path", "_name_or_path", "init",
    "include_path", "task_data", "library",
})  # fmt: skip


def last(path: str) -> str:
    """The last part of a path, whatever parts it."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def scrubbed(text: str, known: Collection[str] = ()) -> str:
    """A text in which absolute paths are their last parts. known: paths that may stand in it, spaces and all."""
    for place in sorted(known, key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place.rstrip("/\\") + "/", "").replace(place, last(place))
    return ABSOLUTE.sub(lambda match: last(match[0]), text)


def without_places(value: Any, known: Collection[str] = (), key: str = "", texts: bool = True) -> Any:
    """A record in which places of this machine are their last parts; addresses and names on the Hub stay.

    texts: whether every text is looked through, or only what stands under a key that names a place.
    """
    if isinstance(value, Mapping):
        return {name: without_places(one, known, name, texts) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(one, known, key, texts) for one in value]
    if not isinstance(value, str):
        return value
    if key in PLACES and _is_place(value):
        return last(value)
    return scrubbed(value, known) if texts and not is_url(value) else value


def places_in(value: Any, key: str = "") -> set[str]:
    """The absolute paths that a record names, and the directories that they lie in."""
    if isinstance(value, Mapping):
        return {place for name, one in value.items() for place in places_in(one, name)}
    if isinstance(value, list | tuple):
        return {place for one in value for place in places_in(one, key)}
    if isinstance(value, str) and key in PLACES and not is_url(value) and Path(value).is_absolute():
        return {value, str(Path(value).parent)}
    return set()


def _is_place(value: str) -> bool:
    """Whether a name is that of a place here: a path, or an address of a file here."""
    if is_url(value):
        return parts_of(value)[0] in LOCAL
    return value.startswith((".", "/", "~")) or "\\" in value or Path(value).exists()
