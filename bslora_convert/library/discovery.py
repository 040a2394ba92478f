"""Adapters of a library: a directory tree, a manifest, or an fsspec URL."""

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from bslora_convert.errors import InputError
from bslora_convert.files.remote import LOCAL
from bslora_convert.files.store import Store, parts_of
from bslora_convert.library.items import Item, check_ids, safe_ids
from bslora_convert.library.manifest import LARGEST_MANIFEST
from bslora_convert.library.tree import Tree
from bslora_convert.lora.adapter import CONFIG_NAME, WEIGHTS_NAMES

MANIFESTS = (".jsonl", ".csv")
NAMED = 3  # notes that an error names
COLUMNS = ("id", "uri", "revision", "prompts", "base_model")


@dataclass(frozen=True, slots=True)
class Discovery:
    """items: the adapters of a library, by id. notes: what was left out, or lies elsewhere, each in a line.

    lost: ids of links that lead to nothing now; what was there may come back.
    """

    items: list[Item]
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


def discover(library: str) -> Discovery:
    """Every adapter of a library.

    A directory is searched at any depth for PEFT directories (`library.tree`). A manifest (`.jsonl`, `.csv`) names `id`, `uri`
    and optionally `revision`, `prompts` and `base_model`; its relative paths start from its own directory.

    :raises InputError: when there is nothing, or a manifest is damaged. :raises RecipeError: when a URL needs a missing package.
    """
    library = _plain(library)
    if "://" in library:
        found = _remote(library)
    else:
        path = Path(library)
        if not path.exists():
            raise InputError(f"{library}: no such file or directory")
        is_manifest = path.is_file() and path.suffix in MANIFESTS
        found = Discovery(_manifest(path)) if is_manifest else _directory(path)
    if not found.items:
        left = f" ({'; '.join(found.notes[:NAMED])})" if found.notes else ""
        raise InputError(
            f"{library}: holds no adapter; a directory with {CONFIG_NAME} and weights, or a manifest, is expected{left}"
        )
    found.items.sort(key=lambda item: item.id)
    check_ids(found.items, library)
    return found


def _plain(uri: str) -> str:
    """A path for `file://`, other URLs as they are.

    :raises InputError: for a URL with credentials, which would end up in records, or one that leads up.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark:
        return uri
    if scheme in LOCAL:
        return rest
    parts_of(uri)
    return uri


def _directory(root: Path) -> Discovery:
    if root.is_file():
        raise InputError(f"{root}: a directory, a manifest ({', '.join(MANIFESTS)}) or a URL is expected")
    tree = Tree(root)
    names = safe_ids(
        [path.relative_to(root).as_posix() if path != root else root.resolve().name for path in tree.adapters]
    )
    items = [Item(name, str(path.absolute())) for name, path in zip(names, tree.adapters, strict=True)]
    return Discovery(items, tree.notes, safe_ids(tree.lost))


def _manifest(path: Path) -> list[Item]:
    if path.stat().st_size > LARGEST_MANIFEST:
        raise InputError(f"{path}: larger than {LARGEST_MANIFEST} bytes")
    items = []
    for line, row in _rows(path):
        where = f"{path}: line {line}"
        values = {key: _text(row.get(key), key, where) for key in COLUMNS}
        name, uri = values["id"], values["uri"]
        if name is None or uri is None:
            raise InputError(f"{where}: id and uri are needed, both text")
        uri = _plain(uri)
        if "://" not in uri:
            uri = _from(path, uri)
        prompts, base = values["prompts"], values["base_model"]
        if prompts is not None:
            if "://" in prompts:
                raise InputError(f"{where}: prompts is {prompts!r}: a file here is expected, not a URL")
            prompts = _from(path, prompts)
        if base is not None and (base.startswith(".") or (path.parent / base).is_dir()):  # else a name on the hub
            base = _from(path, base)
        items.append(Item(name, uri, values["revision"], prompts, base))
    return items


def _text(value: object, column: str, where: str) -> str | None:
    """A column's text, None where it is empty or not there.

    :raises InputError: for anything but text.
    """
    if value is not None and not isinstance(value, str):
        raise InputError(f"{where}: {column} is {type(value).__name__}, text is expected")
    return value or None


def _from(manifest: Path, path: str) -> str:
    """A path that starts from the manifest's directory."""
    return str((manifest.parent / path).absolute())


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            if path.suffix == ".csv":
                reader = csv.DictReader(file)
                for row in reader:
                    yield reader.line_num, row
                return
            for line, content in enumerate(file, 1):
                if content.strip():
                    value = json.loads(content)
                    if not isinstance(value, dict):
                        raise InputError(
                            f"{path}: line {line}: a JSON object is expected, found {type(value).__name__}"
                        )
                    yield line, value
        except (ValueError, RecursionError, csv.Error) as error:
            raise InputError(f"{path}: not a valid manifest ({error})") from None


def _remote(url: str) -> Discovery:
    store = Store.at(url)
    files = {PurePosixPath(name) for name in store.names()}
    folders = sorted({path.parent for path in files if path.name == CONFIG_NAME})
    kept, notes = [], []
    for folder in folders:
        above = next((other for other in folders if other in folder.parents), None)
        if above is not None:
            notes.append(f"{folder}: inside of the adapter {above}, left out")
        elif not any(folder / name in files for name in WEIGHTS_NAMES):
            notes.append(f"{folder}: {CONFIG_NAME} without weights, left out")
        else:
            kept.append(folder)
    top, here = PurePosixPath(store.root).name, PurePosixPath()
    names = safe_ids([folder.as_posix() if folder != here else top for folder in kept])
    items = [
        Item(name, f"{store.url}/{folder}" if folder != here else store.url)
        for name, folder in zip(names, kept, strict=True)
    ]
    return Discovery(items, notes)
