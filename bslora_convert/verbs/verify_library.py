"""`verify` of a library: every adapter of an output of `batch` against what it came from, each base model read once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bslora_convert.behaviour.loaded import base_kept
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.bslora.storage import CONFIG_NAME
from bslora_convert.errors import InputError, RecipeError, Unsaved
from bslora_convert.files.address import resolve
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.store import as_written
from bslora_convert.library.each import FAILED, OK, for_each
from bslora_convert.library.manifest import tenants
from bslora_convert.library.summary import spread
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.options import built
from bslora_convert.recipe.verifying import VerifyOptions
from bslora_convert.report.library_files import refresh
from bslora_convert.results.behaviour import LibraryVerification, Verification
from bslora_convert.verbs.verify import WRITTEN_TOKENS, check_saved, verify

SCHEMA_VERSION = 1
SINGLE = ("reference", "any_reference", "out")  # options that speak of one adapter
TEXTS = ("schema_version", "worst")  # of a record, left out of its row: long, and with --save beside the adapter


def verify_library(
    library: str | Path, options: VerifyOptions | None = None, *, progress: Progress = silent, **fields: Any
) -> LibraryVerification:
    """Measures every adapter of a library and returns a row for each, worst retention first, and what they say together.

    library: a directory, or a URL, which is fetched whole. options, or fields of `VerifyOptions`: as of `verify`, for each
    adapter. Without base_model and prompts each has those of its row of the manifest, and the base model that it names itself.

    :raises InputError: when the library holds no adapter. :raises RecipeError: for an option that is not allowed.
    What is wrong with one adapter is said in its row; a missed threshold is no error: see `passed`.
    """
    asked = built(VerifyOptions, options, fields)
    address, library = as_written(library), resolve(library)
    for name in SINGLE:
        if getattr(asked, name):
            raise RecipeError(f"{name} is of one adapter, and this is a library: leave it out", name)
    if asked.save:
        check_saved(address)
    there, gone = tenants(library)
    prompts = asked.prompts is not None or any(row.get("prompts") for row in there)
    asked.check_measured(prompts, also="; the library's manifest names no prompts")

    def base_of(row: Mapping[str, Any]) -> str | None:
        return str(asked.base_model or row.get("base_model") or "") or None

    def one(row: Mapping[str, Any], tell: Progress) -> dict[str, Any]:
        own = replace(asked, base_model=base_of(row), prompts=asked.prompts or row.get("prompts"))
        try:
            return _told(verify(library / row["id"], options=own, in_library=False, progress=tell))
        except Unsaved as error:  # what was measured is told all the same
            return _told(error.record) | {"status": FAILED, "error": "Unsaved", "message": str(error)}

    ordered = sorted(there, key=lambda row: base_of(row) or _named_base(library / row["id"]))
    with base_kept():
        rows = sorted(for_each(ordered, "measuring", one, progress), key=_worst_first)
    said = refresh(library) if asked.save else None
    bad = [row["id"] for row in rows if row["status"] != OK]
    missed = [row["id"] for row in rows if not row.get("passed", True)]
    return LibraryVerification(
        schema_version=SCHEMA_VERSION,
        library=address,
        rows=rows,
        adapters=len(rows),
        bad=bad,
        missed=missed,
        retention=spread(_measured(rows, "retention")),
        kl=spread(_measured(rows, "kl")),
        agreement=spread(_measured(rows, "agreement")),
        passed=not bad and not missed,
        notes=[*gone, *([said] if said else [])],
    )


def cost(library: str | Path, options: VerifyOptions) -> str:
    """What measuring a library will take, as a sentence: said before it begins.

    Raises what `verify_library` raises of a library and of prompts.
    """
    there, _ = tenants(resolve(library))
    files = Counter(str(options.prompts or row.get("prompts") or "") for row in there)
    rows = writing = 0
    for file, adapters in files.items():
        if file:
            read = Prompts.read(file, options.limit).rows
            rows += adapters * len(read)
            writing += adapters * sum(row.completion is None for row in read)
    said = f"{len(there)} adapters, {rows:,} rows in all"
    if writing:
        tokens = options.max_new_tokens or WRITTEN_TOKENS
        said += f"; {writing:,} of them have no completion, and each adapter's original writes it first, {tokens} tokens at most"
    return said


def _named_base(directory: Path) -> str:
    """The base model that an adapter names; nothing where its configuration can't be read, which is said when it is its turn."""
    try:
        return str(read_json(directory / CONFIG_NAME).get("base_model_name_or_path"))
    except InputError:
        return ""


def _told(record: Verification) -> dict[str, Any]:
    return {name: value for name, value in record.to_dict().items() if name not in TEXTS}


def _worst_first(row: Mapping[str, Any]) -> tuple[bool, float, str]:
    """By retention, those without one last."""
    kept = row.get("retention")
    return kept is None, kept if kept is not None else 0.0, row["id"]


def _measured(rows: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows if row.get(name) is not None]
