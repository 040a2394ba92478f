"""An adapter's files from a hub or another store: `hf://org/name[@revision][/sub]`, or any fsspec URL.

What a hub gave stays in its own cache (`HF_HOME`); what another store gave is gone when the process ends.
"""

import os
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from bslora_convert.errors import InputError, reason_of
from bslora_convert.extras import need
from bslora_convert.files.store import HUB, Store, parts_of

REPO = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<sub>.+))?")
LOCAL = ("file", "local")
WANTED = (
    "*.json",
    "*.jsonl",
    "*.jinja",
    "*.md",
    "*.model",
    "*.model.v*",
    "*.safetensors",
    "*.bin",
    "*.codes",
    "*.spm",
    "*.tiktoken",
    "*.txt",
    "adapter_model.pt",
    "mm_projector.*",
    "non_lora_*",
    "v_head.*",
    "value_head.*",
)  # of an adapter's directory, or of a library's
COMMON = "initialisation-*.safetensors"  # of a library, above its adapters (`bslora.common`)
HELD: list["TemporaryDirectory[str]"] = []  # until the process ends


@cache
def fetched(address: str, inner: str | None = None) -> Path:
    """The directory of an adapter's files, or of a library's, on this machine; each address is fetched once a process.

    inner: an adapter of a library at that address.

    :raises InputError: when it can't be fetched. :raises RecipeError: when a package is missing.
    """
    scheme, rest = parts_of(address)
    if scheme in LOCAL:
        return Path("/") / rest / (inner or "")
    return _from_hub(rest, inner) if scheme == HUB else _from_store(address, inner)


def _from_hub(rest: str, inner: str | None) -> Path:
    match = REPO.fullmatch(rest)
    if match is None:
        raise InputError(f"hf://{rest}: hf://org/name, with @revision and /folder if need be, is expected")
    need("hub", "hf://")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    above = f"{match['sub']}/" if match["sub"] else ""
    folder = f"{above}{inner}/" if inner else above
    patterns = [f"{folder}{kind}" for kind in WANTED] + [f"{over}{COMMON}" for over in _above(folder)]
    try:
        root = snapshot_download(
            match["repo"], revision=match["revision"], allow_patterns=patterns, endpoint=os.environ.get("HF_ENDPOINT")
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise InputError(f"hf://{rest}: not there, or not for you ({reason_of(error)})") from None
    place = Path(root) / folder
    if not place.is_dir():
        raise InputError(f"hf://{rest}: holds no files of an adapter in {folder or 'its root'}")
    return place


def _above(folder: str) -> list[str]:
    """The directories above one, the root first: `a/b/` -> ``, `a/`."""
    parts = folder.rstrip("/").split("/")
    return ["".join(f"{part}/" for part in parts[:length]) for length in range(len(parts))] if folder else []


def _from_store(address: str, inner: str | None) -> Path:
    store = Store.at(address)
    held = TemporaryDirectory(prefix="bslora-")
    place = Path(held.name)
    try:
        names = store.names(inner or "")
        store.copy([name for name in names if any(fnmatchcase(name, kind) for kind in WANTED)], place)
        if inner:
            above = {name for over in _above(f"{inner}/") for name in store.names(over.rstrip("/"), depth=1)}
            store.copy([name for name in above if fnmatchcase(name.rpartition("/")[2], COMMON)], place)
        if not (place / (inner or "")).is_dir() or not any(place.iterdir()):
            raise InputError(f"{store.url}: no such place, or an empty one")
    except InputError:
        held.cleanup()
        raise
    HELD.append(held)
    return place / (inner or "")
