"""The manifest of a converted library: which adapters it holds, by what `batch` wrote."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bslora_convert.errors import InputError
from bslora_convert.files.address import MANIFEST
from bslora_convert.files.remote import LOCAL, fetched
from bslora_convert.files.store import Store, as_written, is_url, parts_of

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
    for number, line in enumerate(_lines(out), 1):
        try:
            row = json.loads(line)
            rows[row["id"]] = row
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}: line {number} is damaged; run `batch` again to make it anew") from None
    return list(rows.values())


def _lines(out: str | Path) -> list[bytes]:
    missing = InputError(f"{as_written(out)}: no {MANIFEST}; the output of `batch` is expected")
    if not is_url(out):
        path = Path(out) / MANIFEST
        if not path.is_file():
            raise missing
        return path.read_bytes().splitlines()
    store = Store.at(str(out))
    size = store.bytes_of(MANIFEST)
    if size is None:
        raise missing
    if size > LARGEST_MANIFEST:
        raise InputError(f"{as_written(out)}/{MANIFEST}: larger than {LARGEST_MANIFEST} bytes")
    with TemporaryDirectory(prefix="bslora-") as place:
        store.copy([MANIFEST], Path(place))
        return (Path(place) / MANIFEST).read_bytes().splitlines()


def held(out: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(Rows of the adapters that a library holds, a note where some were converted and taken away since).

    :raises InputError: when it holds none, or its manifest is damaged.
    """
    done = [row for row in read_manifest(out) if row["status"] in DONE]
    there = [row for row in done if (out / row["id"]).is_dir()]
    if not there:
        raise InputError(f"{out}: holds no converted adapter")
    gone = len(done) - len(there)
    return there, [f"{gone} adapters of the manifest are not there any more"] if gone else []
