"""Reading JSON files, and other small ones, without trusting them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bslora_convert.errors import InputError

LARGEST_JSON = 64 << 20
LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    :raises InputError: when the file is missing, too large, not JSON or not an object.
    """
    value = parsed(path, json.loads, "JSON")
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


def parsed(path: Path, parse: Callable[[str], Any], kind: str, most: int = LARGEST_JSON) -> Any:
    """What a text file of at most `most` bytes says. kind: what `parse` reads.

    :raises InputError: when the file is missing, too large or not of this kind.
    """
    check_file(path)
    if path.stat().st_size > most:
        raise InputError(f"{path}: {path.stat().st_size} bytes is too large for a configuration file")
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid {kind} ({error})") from None


def check_file(path: Path) -> None:
    """Refuses what is no file with content, or stands for one that was not fetched.

    :raises InputError: naming it.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not path.is_file():
        raise InputError(f"{path}: not a regular file")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: the file is empty")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise InputError(f"{path}: a Git-LFS pointer, not the file itself; run `git lfs pull` first")
