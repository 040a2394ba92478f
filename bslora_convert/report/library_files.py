"""What stands beside the adapters of a library: manifest, summary, page and README, written together from the same rows."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from bslora_convert.errors import BsloraConvertError
from bslora_convert.files.address import CARD, MANIFEST, PAGE, SUMMARY
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.landing import replace_file
from bslora_convert.files.record import text_of
from bslora_convert.library.manifest import DONE, locked, read_manifest
from bslora_convert.library.rows import behaviour_of
from bslora_convert.library.summary import spread_of_behaviour
from bslora_convert.results.library import BatchSummary


def write(out: Path, rows: Sequence[Mapping[str, Any]], summary: BatchSummary) -> BatchSummary:
    """Writes the four, with what has been measured of each adapter's behaviour, and returns the summary as it was written."""
    with locked(out):
        return _write(out, rows, summary)


def _write(out: Path, rows: Sequence[Mapping[str, Any]], summary: BatchSummary) -> BatchSummary:
    from bslora_convert.report import library as report
    from bslora_convert.report import library_card

    listed = [_with_behaviour(out, row) for row in rows]
    summary = replace(
        summary, behaviour=spread_of_behaviour([row["behaviour"] for row in listed if row.get("behaviour")])
    )
    replace_file(out / MANIFEST, "".join(json.dumps(row) + "\n" for row in listed))
    replace_file(out / SUMMARY, text_of(summary.to_dict()))
    replace_file(out / PAGE, report.render(summary, listed))
    replace_file(out / CARD, library_card.render([row for row in listed if row["status"] in DONE]))
    return summary


def refresh(out: Path) -> str | None:
    """Writes them anew, after adapters were measured; nothing where `batch` left no summary. Returns why it could not, if so."""
    if not (out / SUMMARY).is_file():
        return None
    try:
        with locked(out):
            _write(out, read_manifest(out), BatchSummary.from_dict(read_json(out / SUMMARY)))
    except (BsloraConvertError, OSError) as error:
        return f"what was measured is not in the library's own files: {error}"
    return None


def library_of(directory: Path) -> Path | None:
    """The library that a directory is an adapter of, by the manifest above it; None where it is of none."""
    for above in directory.absolute().parents:
        if (above / MANIFEST).is_file() and (above / SUMMARY).is_file():
            name = directory.absolute().relative_to(above).as_posix()
            with suppress(BsloraConvertError):
                return above if any(row["id"] == name for row in read_manifest(above)) else None
    return None


def _with_behaviour(out: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    found = behaviour_of(out / row["id"]) if row["status"] in DONE else None
    return {**row, "behaviour": found}
