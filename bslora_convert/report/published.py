"""What of a result goes to the Hub, and as what: nothing that says where it lay on somebody's disk, and no prompts.

    an adapter       its files; paths in its records are their last parts, its card is written anew
    a library        each tenant's files so, the initialisation that they have in common, the manifest of the tenants, a README

Reports (pages, `verify.json`, `training.jsonl`) hold rows of prompts and stay behind unless they are asked for. A base model
that is named by a path is named by the path's last part.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from bslora_convert.bslora.common import commons_in, needed_by
from bslora_convert.errors import InputError
from bslora_convert.files.address import MANIFEST, PAGE, SUMMARY
from bslora_convert.files.card import CARD_NAME, carried
from bslora_convert.files.hashing import sha256
from bslora_convert.files.hub import Content, files_of
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.record import EXPANSION_NAME, FIDELITY_NAME, text_of
from bslora_convert.files.scrub import places_in, without_places
from bslora_convert.library.manifest import is_library, tenants
from bslora_convert.lora.place import CONFIG_NAME
from bslora_convert.report import card, expansion, library_card
from bslora_convert.results.adapter import Expanded, Fidelity

RECORDS = (FIDELITY_NAME, EXPANSION_NAME)
REPORTS = (PAGE, "verify.json", "training.jsonl")
WEIGHTS = (".safetensors", ".gguf")
SMALL = 1 << 20  # bytes of a JSON file that may hold the name of a place


def published(place: Path, repo: str, reports: bool = False) -> dict[str, Content]:
    """What is uploaded of a directory to a repository, by its name there. reports: whether pages and measurements go as well.

    :raises InputError: when the directory holds no result, a record is damaged, or weights are not what was written.
    """
    if not place.is_dir():
        raise InputError(f"{place}: no such directory")
    if any((place / name).is_file() for name in RECORDS):
        return _adapter(place, reports, place.resolve().name)
    if is_library(place):
        return _library(place, repo, reports)
    found = {
        f"{name}/{file}": content
        for name in _expanded_in(place)
        for file, content in _adapter(place / name, reports, name).items()
    }
    if not found:
        raise InputError(f"{place}: holds no result of compress, finetune, expand or batch")
    return found


def _expanded_in(place: Path) -> list[str]:
    """The adapters that `expand` wrote of a library, by their paths."""
    return sorted(path.parent.relative_to(place).as_posix() for path in place.rglob(EXPANSION_NAME))


def _library(place: Path, repo: str, reports: bool) -> dict[str, Content]:
    rows, _ = tenants(place)
    named = {row["settings"].get("initialisation") for row in rows}
    found: dict[str, Content] = {path.name: path for path in commons_in(place) if path.name in named}
    public = [without_places({**row, "uri": row["id"]}, places_in(row)) for row in rows]
    for row in rows:
        for name, content in _adapter(place / row["id"], reports, row["id"]).items():
            if name not in found:
                found[f"{row['id']}/{name}"] = content
    found[MANIFEST] = "".join(json.dumps(row) + "\n" for row in public).encode()
    if (place / SUMMARY).is_file():
        summary = {**read_json(place / SUMMARY), "left_over": [], "pruned": [], "notes": []}
        found[SUMMARY] = text_of(without_places(summary)).encode()
    if reports and (place / PAGE).is_file():
        found[PAGE] = place / PAGE
    found[CARD_NAME] = library_card.render(public, f"hf://{repo}").encode()
    return found


def _adapter(place: Path, reports: bool, name: str) -> dict[str, Content]:
    """The files that one directory's record names, with records, card and configuration that name no place."""
    record_name = next((one for one in RECORDS if (place / one).is_file()), None)
    if record_name is None:
        raise InputError(f"{place}: has no {' or '.join(RECORDS)}, so nobody knows what of it is a result")
    raw = read_json(place / record_name)
    files = raw.get("files")
    if not isinstance(files, dict) or not isinstance(raw.get("source"), dict):
        raise InputError(f"{place / record_name}: says nothing of source and files; the record is damaged")
    found: dict[str, Content] = {
        one: place / one
        for one in sorted(files_of(place))
        if one in files and (reports or one.rpartition("/")[2] not in REPORTS)
    }
    for one in found:
        if one.endswith(WEIGHTS) and sha256(place / one) != files[one].get("sha256"):
            raise InputError(f"{place / one}: not the file that was written; nothing of it was uploaded")
    found |= needed_by(place)
    known = places_in(raw) | {str(place.resolve()), str(place.absolute())}
    config = without_places(read_json(place / CONFIG_NAME), texts=False) if (place / CONFIG_NAME).is_file() else {}
    for one in found:
        if one.endswith(".json") and (place / one).is_file() and (place / one).stat().st_size < SMALL:
            found[one] = _plain(place / one)
    said = without_places(raw, known)
    said["source"]["path"] = name.rpartition("/")[2]
    if not reports and isinstance(said.get("functional"), dict):
        said["functional"]["worst"] = []
    del said["files"]
    if record_name == FIDELITY_NAME:
        found[CARD_NAME] = card.render(Fidelity.from_dict(said), config).encode()
    else:
        found[CARD_NAME] = expansion.render(Expanded.from_dict(said), config, carried(place)).encode()
    said["files"] = {
        one: _looks(content) if isinstance(content, bytes) else files[one]
        for one, content in found.items()
        if isinstance(content, bytes) or one in files
    }
    found[record_name] = text_of(said).encode()
    return found


def _plain(path: Path) -> Content:
    """A small JSON file whose keys name no place; the file itself where none did."""
    try:
        raw = read_json(path)
    except InputError:  # a list, for instance
        return path
    public = without_places(raw, texts=False)
    return path if public == raw else (json.dumps(public, indent=1) + "\n").encode()


def _looks(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
