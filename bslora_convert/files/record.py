"""What this tool wrote into a directory, so that it replaces its own results only and notices what changed since.

A result's record (`fidelity.json`, `expansion.json`, `analysis.json` or `comparison.json`) is written last and has

    "files": {"<path in the directory>": {"bytes": N, "sha256": "<hex>"}, …}        every file beside it
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bslora_convert.errors import InputError
from bslora_convert.files.hashing import sha256
from bslora_convert.files.jsonfile import read_json
from bslora_convert.results.record import Files

FIDELITY_NAME, EXPANSION_NAME, ANALYSIS_NAME, COMPARISON_NAME = RECORDS = (
    "fidelity.json",
    "expansion.json",
    "analysis.json",
    "comparison.json",
)
NAMED = 4  # entries that an error names


def seal(place: Path, name: str, value: Mapping[str, Any], known: Mapping[str, str] | None = None) -> Files:
    """Writes `value` as the record of a directory, with `files` of all that stands there, and returns these.

    known: hashes that were taken already, by path in the directory.
    """
    files: Files = {}
    for path in _entries(place):
        entry = path.relative_to(place).as_posix()
        if path.is_file() and entry != name:
            files[entry] = {"bytes": path.stat().st_size, "sha256": (known or {}).get(entry) or sha256(path)}
    (place / name).write_text(text_of({**value, "files": files}), encoding="utf-8")
    return files


def text_of(record: Mapping[str, Any]) -> str:
    """A record as its file has it."""
    return json.dumps(record, indent=1) + "\n"


def foreign(directory: Path) -> list[str]:
    """What stands in a directory that this tool did not write, or that was changed since; empty where all is its own.

    A directory of which no record speaks is named alone, whatever it holds.
    """
    record, known = _record_of(directory)
    folders = {parent.as_posix() for name in known for parent in Path(name).parents}
    found = []
    for path in _entries(directory, into=folders):
        name = path.relative_to(directory).as_posix()
        if path.is_dir() and not path.is_symlink():
            if name not in folders:
                found.append(f"{name}/")
        elif path.is_symlink() or not path.is_file():
            found.append(name)
        elif name != record:
            if name not in known:
                found.append(name)
            elif not _is_as_written(path, known[name]):
                found.append(f"{name} (changed since it was written)")
    return found


def named(entries: Sequence[str], most: int = NAMED) -> str:
    """The first entries, and how many more there are."""
    more = len(entries) - most
    return ", ".join(entries[:most]) + (f" and {more} more" if more > 0 else "")


def recorded(directory: Path) -> dict[str, Any]:
    """What a compact directory's record says; nothing where it has none.

    :raises InputError: when the record is damaged.
    """
    path = directory / FIDELITY_NAME
    value = read_json(path) if path.is_file() else {}
    for part in ("source", "compact"):
        if not isinstance(value.get(part, {}), dict):
            raise InputError(f"{path}: {part} is no object; the record is damaged")
    return value


def _is_as_written(path: Path, known: Mapping[str, Any]) -> bool:
    return path.stat().st_size == known.get("bytes") and sha256(path) == known.get("sha256")


def _record_of(directory: Path) -> tuple[str | None, dict[str, Mapping[str, Any]]]:
    """(Name of the directory's record, the files of which it speaks); nothing where there is no record of ours."""
    for name in RECORDS:
        path = directory / name
        if not path.is_file() or path.is_symlink():
            continue
        try:
            value = read_json(path)
        except InputError:
            continue
        files = value.get("files")
        if "tool_version" in value and isinstance(files, dict) and all(isinstance(f, dict) for f in files.values()):
            return name, files
    return None, {}


def _entries(directory: Path, into: set[str] | None = None) -> Iterator[Path]:
    """Everything in a directory, in order; of sub-directories only those named in `into`, all of them without it."""
    for path in sorted(directory.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            name = path.relative_to(directory).as_posix()
            if into is None or name in into:
                inner = None if into is None else {p.removeprefix(f"{name}/") for p in into if p.startswith(f"{name}/")}
                yield from _entries(path, inner)
