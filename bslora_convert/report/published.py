"""What of a result goes to the Hub, and as what: nothing that says where it lay on somebody's disk, and no prompts.

    an adapter       its files; paths in its records are their last parts, its card is written anew
    a library        each tenant's files so, the initialisation that they have in common, the manifest of the tenants, a README

Reports (pages, `verify.json`, `training.jsonl`) hold rows of prompts and stay behind unless they are asked for. A base model
that is named by a path is named by the path's last part.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bslora_convert.bslora.common import commons_in, needed_by
from bslora_convert.errors import InputError
from bslora_convert.files.address import MANIFEST, PAGE, SUMMARY
from bslora_convert.files.card import CARD_NAME, carried
from bslora_convert.files.hub import Content, files_of
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.record import EXPANSION_NAME, FIDELITY_NAME, text_of
from bslora_convert.files.store import is_url
from bslora_convert.library.manifest import is_library, tenants
from bslora_convert.lora.place import CONFIG_NAME
from bslora_convert.report import card, expansion, library_card
from bslora_convert.results.adapter import Expanded, Fidelity

REPORTS = (PAGE, "verify.json", "training.jsonl")
ABSOLUTE = re.compile(r"(?<![\w/:.~])(?:~|[A-Za-z]:)?(?:[/\\][^\s/\\,;:'\"()]+){2,}[/\\]?")
PLACES = (
    "path",
    "uri",
    "prompts",
    "finetune",
    "base_model",
    "base_model_name_or_path",
    "init",
    "include_path",
    "task_data",
)


def published(place: Path, repo: str, reports: bool = False) -> dict[str, Content]:
    """What is uploaded of a directory to a repository, by its name there. reports: whether pages and measurements go as well.

    :raises InputError: when the directory holds nothing, or a record is damaged.
    """
    if not place.is_dir():
        raise InputError(f"{place}: no such directory")
    found = _library(place, repo, reports) if is_library(place) else _adapter(place, reports, place.resolve().name)
    if not found:
        raise InputError(f"{place}: holds no files")
    return found


def _library(place: Path, repo: str, reports: bool) -> dict[str, Content]:
    rows, _ = tenants(place)
    named = {row["settings"].get("initialisation") for row in rows}
    found: dict[str, Content] = {path.name: path for path in commons_in(place) if path.name in named}
    public = [without_paths({**row, "uri": row["id"]}) for row in rows]
    for row in rows:
        for name, content in _adapter(place / row["id"], reports, row["id"]).items():
            if name not in found:
                found[f"{row['id']}/{name}"] = content
    found[MANIFEST] = "".join(json.dumps(row) + "\n" for row in public).encode()
    if (place / SUMMARY).is_file():
        found[SUMMARY] = text_of(without_paths(read_json(place / SUMMARY))).encode()
    if reports and (place / PAGE).is_file():
        found[PAGE] = place / PAGE
    found[CARD_NAME] = library_card.render(public, f"hf://{repo}").encode()
    return found


def _adapter(place: Path, reports: bool, name: str) -> dict[str, Content]:
    """The files of one directory; of a compact or expanded one with records, card and configuration that name no place."""
    found: dict[str, Content] = {one: place / one for one in sorted(files_of(place)) if reports or one not in REPORTS}
    for needed, path in needed_by(place).items():
        found[needed] = path
    config = without_paths(read_json(place / CONFIG_NAME)) if (place / CONFIG_NAME).is_file() else {}
    if config:
        found[CONFIG_NAME] = (json.dumps(config, indent=1) + "\n").encode()
    for record_name, kind in ((FIDELITY_NAME, Fidelity), (EXPANSION_NAME, Expanded)):
        if record_name not in found:
            continue
        said = without_paths(read_json(place / record_name))
        said["source"]["path"] = name.rpartition("/")[2]
        if not reports and isinstance(said.get("functional"), dict):
            said["functional"]["worst"] = []
        files = said.pop("files", None) or {}
        record = kind.from_dict(said)
        if isinstance(record, Fidelity):
            found[CARD_NAME] = card.render(record, config).encode()
        elif isinstance(record, Expanded):
            found[CARD_NAME] = expansion.render(record, config, carried(place)).encode()
        said["files"] = {one: _looks(content) if isinstance(content, bytes) else files[one] for one, content in found.items()
                         if one != record_name and (isinstance(content, bytes) or one in files)}  # fmt: skip
        found[record_name] = text_of(said).encode()
    return found


def _looks(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def without_paths(value: Any, key: str = "") -> Any:
    """A record in which places of this machine are their last parts; addresses and names on the Hub stay."""
    if isinstance(value, Mapping):
        return {name: without_paths(one, name) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(one, key) for one in value]
    if not isinstance(value, str) or is_url(value):
        return value
    if key in PLACES and (value.startswith((".", "/", "~")) or "\\" in value or Path(value).exists()):
        return last(value)
    return ABSOLUTE.sub(lambda match: last(match[0]), value)


def last(path: str) -> str:
    """The last part of a path, whatever parts it."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
