"""The manifest of a converted library: which adapters it holds, by what `batch` wrote."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bslora_convert.bslora.storage import CONFIG_NAME, PEFT_TYPE
from bslora_convert.errors import InputError
from bslora_convert.files.address import MANIFEST, STATE, check_id, resolve
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.remote import LOCAL, fetched
from bslora_convert.files.store import Store, as_written, is_url, parts_of
from bslora_convert.library.rows import row_of

DONE = ("ok", "skipped")  # statuses of adapters that are there
LARGEST_MANIFEST = 256 << 20


def read_manifest(out: str | Path) -> list[dict[str, Any]]:
    """The rows of a finished batch, of which a URL's manifest alone is fetched.

    :raises InputError: when there is none, or it can't be fetched.
    """
    if is_url(out) and parts_of(out)[0] in LOCAL:
        out = fetched(str(out))
    path = f"{as_written(out)}/{MANIFEST}" if is_url(out) else Path(out) / MANIFEST
    rows: dict[str, dict[str, Any]] = {}  # of an adapter that stands there twice the last one counts
    lines = _lines(out)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            check_id(row["id"], MANIFEST)
            if not isinstance(row["status"], str) or not isinstance(row.get("settings", {}), dict):
                raise TypeError(row)
            rows[row["id"]] = {"settings": {}, **row}
        except (ValueError, KeyError, TypeError, AttributeError, InputError):
            if number == len(lines) and not line.endswith(b"\n"):  # `batch` is writing it
                continue
            raise InputError(f"{path}: line {number} is damaged; run `batch` again to make it anew") from None
    return list(rows.values())


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Inside, nobody else of this machine writes what stands beside the adapters of a library that `batch` made."""
    if not (out / STATE).is_dir():
        yield
        return
    with (out / STATE / ".lock").open("a") as lock:
        with suppress(ImportError):  # Windows has no such locks
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def append(out: Path, row: Mapping[str, Any]) -> None:
    """Puts a row at the end of the manifest, in the place of an earlier one of the same adapter."""
    with locked(out), (out / MANIFEST).open("a", encoding="utf-8") as manifest:
        manifest.write(json.dumps(row) + "\n")


def _lines(out: str | Path) -> list[bytes]:
    missing = InputError(f"{as_written(out)}: no {MANIFEST}; the output of `batch` is expected")
    if not is_url(out):
        path = Path(out) / MANIFEST
        if not path.is_file():
            raise missing
        return path.read_bytes().splitlines(keepends=True)
    store = Store.at(str(out))
    size = store.bytes_of(MANIFEST)
    if size is None:
        raise missing
    if size > LARGEST_MANIFEST:
        raise InputError(f"{as_written(out)}/{MANIFEST}: larger than {LARGEST_MANIFEST} bytes")
    with TemporaryDirectory(prefix="bslora-") as place:
        store.copy([MANIFEST], Path(place))
        return (Path(place) / MANIFEST).read_bytes().splitlines(keepends=True)


def is_library(address: str | Path) -> bool:
    """Whether an address means a library: one that `batch` made, pushed or copied ones too, or compact directories side by side.

    :raises InputError: when it can't be fetched. :raises RecipeError: when fetching needs a package that is missing.
    """
    place = resolve(address)
    if not place.is_dir() or (place / CONFIG_NAME).is_file():
        return False
    return (place / MANIFEST).is_file() or next(compact_in(place), None) is not None


def tenants(place: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(A row for each adapter that a library holds, notes): by its manifest, or without one by what the directory holds.

    Notes say where there is no manifest, and where adapters were converted and taken away since.

    :raises InputError: when it holds none, or its manifest is damaged.
    """
    if not (place / MANIFEST).is_file():
        rows = [row_of(place / name, name) for name in compact_in(place)]
        notes = [f"{place} has no {MANIFEST}: its adapters are the {len(rows)} compact directories that it holds"]
        done = rows
    else:
        done = [row for row in read_manifest(place) if row["status"] in DONE]
        rows = [row for row in done if (place / row["id"]).is_dir()]
        gone = len(done) - len(rows)
        notes = [f"{gone} adapters of the manifest are not there any more"] if gone else []
    if not rows:
        raise InputError(f"{place}: holds no converted adapter")
    return rows, notes


def compact_in(place: Path) -> Iterator[str]:
    """Every compact directory below a place by its path there, none inside of another, hidden ones and links left out."""
    for root, folders, files in os.walk(place):
        at = Path(root)
        if CONFIG_NAME in files and at != place:
            folders.clear()
            with suppress(InputError):
                if read_json(at / CONFIG_NAME).get("peft_type") == PEFT_TYPE:
                    yield at.relative_to(place).as_posix()
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
