"""Reading JSON files without trusting them."""

import json
from pathlib import Path
from typing import Any

from bslora_convert.errors import InputError

LARGEST_JSON = 64 << 20
LFS_POINTER = b"version https://git-lfs"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    :raises InputError: when the file is missing, too large, not JSON or not an object.
    """
    check_file(path)
    if path.stat().st_size > LARGEST_JSON:
        raise InputError(f"{path}: {path.stat().st_size} bytes is too large for a configuration file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: a JSON object is expected, found {type(value).__name__}")
    return value


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
