"""`inspect` of a library: its tenants, what they call their base, sizes, behaviour, damage; and whom a server would refuse."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bslora_convert.bslora.storage import WEIGHTS_NAME, changed
from bslora_convert.errors import BsloraConvertError, RecipeError
from bslora_convert.files.address import resolve
from bslora_convert.files.integrity import CHANGED, integrity
from bslora_convert.files.store import as_written
from bslora_convert.files.tensorfile import read_headers
from bslora_convert.layers.slots import STEPS
from bslora_convert.library.manifest import tenants
from bslora_convert.library.rows import BEHAVIOUR, behaviour_of
from bslora_convert.library.serving import serving
from bslora_convert.library.summary import bases_of, spread_of_behaviour
from bslora_convert.modules.factors import Shape
from bslora_convert.process.progress import Progress, silent
from bslora_convert.results.library import LibraryInspection, ServerRecord
from bslora_convert.vllm.base import check_name, check_shapes, shapes_of
from bslora_convert.vllm.settings import aliases_in
from bslora_convert.vllm.tenants import parsed, read_files, servable


def inspect_library(
    library: str | Path,
    base_model: str | None = None,
    max_lora_rank: int | None = None,
    *,
    progress: Progress = silent,
) -> LibraryInspection:
    """Describes a library; with a base model also which tenants a vLLM that serves it would refuse, and why.

    library: a directory, or a URL, which is fetched whole. base_model: as `vllm serve` is given it; where its files are here,
    shapes are compared too. max_lora_rank: of that server, or None for the one that the tenants need. Further names of the base
    are those in `BSLORA_BASE_ALIASES`, as for the server.

    :raises InputError: when it holds no adapter, or its manifest is damaged. :raises RecipeError: for a rank that none takes.
    """
    if max_lora_rank is not None and (base_model is None or max_lora_rank not in STEPS):
        raise RecipeError(
            f"max_lora_rank is {max_lora_rank}: one of {', '.join(map(str, STEPS))} is allowed, with base_model",
            "max_lora_rank", "base_model",
        )  # fmt: skip
    place = resolve(library)
    there, notes = tenants(place)
    shapes = shapes_of(base_model) if base_model is not None else {}
    if base_model is not None and not shapes:
        notes.append(f"the files of {base_model} are not here, so names alone were compared, not shapes")
    rows, refused = [], []
    for at, row in enumerate(there):
        progress("checking", at, len(there), row["id"])
        directory = place / row["id"]
        damage = _damage(directory)
        rows.append(
            {
                "id": row["id"],
                "base_model": row["settings"].get("base_model"),
                "bytes": row.get("bytes"),
                "source_bytes": row.get("source_bytes"),
                "expanded_rank": row["settings"].get("expanded_rank"),
                "relative_error": row.get("relative_error"),
                **dict.fromkeys((*BEHAVIOUR, "rows", "when")),
                **(behaviour_of(directory) or {}),
                "damage": damage,
            }
        )
        if base_model is not None:
            why = damage or _refused(directory, base_model, shapes, row, max_lora_rank)
            if why is not None:
                refused.append({"id": row["id"], "why": why})
    whole = [row for row in there if "width" in row["settings"]]
    found = serving(whole)
    return LibraryInspection(
        kind="library",
        library=as_written(library),
        adapters=len(there),
        bases=bases_of(there),
        bytes=sum(row["bytes"] or 0 for row in rows),
        source_bytes=sum(row["source_bytes"] or 0 for row in rows),
        serving=found,
        behaviour=spread_of_behaviour([row for row in rows if row["rows"] is not None]),
        damaged=[row["id"] for row in rows if row["damage"] is not None],
        rows=rows,
        server=None
        if base_model is None
        else ServerRecord(
            base_model=base_model,
            max_lora_rank=max_lora_rank,
            needed_rank=found["compact"]["slot_rank"] if found else None,
            refused=refused,
        ),
        notes=notes,
    )


def _damage(directory: Path) -> str | None:
    """What is wrong with an adapter's files; None where they are what was written, or nobody can tell."""
    try:
        files = read_files(directory)
        parsed(files, directory)
        read_headers(directory / WEIGHTS_NAME)
        if integrity(directory, directory / WEIGHTS_NAME) == CHANGED:
            return changed(directory)
    except BsloraConvertError as error:
        return str(error)
    return None


def _refused(
    directory: Path, base: str, shapes: Mapping[str, Shape], row: Mapping[str, Any], most: int | None
) -> str | None:
    """Why the server would refuse an adapter whose files are whole; None where it would not."""
    try:
        config, layout = parsed(read_files(directory), directory)
        check_name(config.get("base_model_name_or_path"), base, aliases_in(os.environ))
        check_shapes(layout.modules, shapes)
        adapter = servable(directory)
    except BsloraConvertError as error:
        return str(error)
    form = adapter.form
    largest = max(form.expanded_rank(name) for name in form.modules)
    if most is not None and largest > most:
        return f"its expanded rank is {largest}, and the server's --max-lora-rank is {most}"
    return None
