"""`expand` of a library: every adapter of an output of `batch` as `expand` writes it, each into its own directory."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bslora_convert.files.address import MARK, resolve
from bslora_convert.files.landing import check_apart, check_output, check_outside
from bslora_convert.files.store import as_written, is_url
from bslora_convert.library.each import OK, for_each
from bslora_convert.library.manifest import tenants
from bslora_convert.library.serving import together
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.expanding import ExpandOptions
from bslora_convert.results.adapter import ServedRecord
from bslora_convert.results.library import LibraryExpansion
from bslora_convert.verbs.expand import expand, planned


def expand_library(
    library: str | Path,
    out: str | Path,
    options: ExpandOptions | None = None,
    *,
    progress: Progress = silent,
    **fields: Any,
) -> LibraryExpansion:
    """Writes every adapter of a library to `out/<id>` and returns a row for each, with what `expand` says of it.

    library: a directory, or a URL, which is fetched whole. options, or fields of `ExpandOptions`: as of `expand`; overwrite
    replaces adapters that `expand` wrote to `out` before, and what else is there stays.

    :raises InputError: when the library holds no adapter. :raises RecipeError: for an option that is not allowed.
    :raises OutputError: when the output place can't be used. What is wrong with one adapter is said in its row.
    """
    place, out, address = resolve(library), Path(out), as_written(library)
    asked = planned(options, fields)
    check_place(place, out, asked.overwrite)
    there, gone = tenants(place)

    def one(row: Any, _: Progress) -> dict[str, Any]:
        name = f"{address}{MARK}{row['id']}" if is_url(address) else None
        return expand(place / row["id"], out / row["id"], asked, recorded_as=name).to_dict()

    rows = for_each(there, "expanding", one, progress)
    good = [row for row in rows if row["status"] == OK]
    served = [row["served"] for row in good if row["served"]]
    return LibraryExpansion(
        library=address,
        rows=rows,
        adapters=len(rows),
        bad=len(rows) - len(good),
        bytes=sum(row["bytes"] for row in good),
        rank=max((row["ranks"]["max"] for row in good if "max" in row["ranks"]), default=None),
        served=ServedRecord(
            max_lora_rank=_largest(slot["max_lora_rank"] for slot in served),
            slot_bytes=_largest(slot["slot_bytes"] for slot in served),
            target_modules=together(slot.get("target_modules") for slot in served),
            options=sorted({option for slot in served for option in slot.get("options") or ()}) or None,
        )
        if served
        else None,
        notes=gone,
    )


def _largest(values: Iterable[int | None]) -> int | None:
    """The largest of all; None where one is, for then no slot holds them all."""
    values = list(values)
    return None if None in values else max(value for value in values if value is not None)


def check_place(library: Path, out: Path, overwrite: bool) -> None:
    """Refuses an output place for a library, before any work is done.

    With `overwrite` it may hold anything: each adapter's own directory is what is looked at, and replaced.

    :raises InputError: when it lies in the library or holds it. :raises OutputError: when it can't be used.
    """
    if overwrite and out.is_dir():
        check_apart(library, out)
        check_outside(out)
    else:
        check_output(out, overwrite, library)
