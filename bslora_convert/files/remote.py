"""An adapter's files from a hub or another store: `hf://org/name[@revision][/sub]`, or any fsspec URL.

What a hub gave stays in its own cache (`HF_HOME`); what another store gave is gone when the process ends. Credentials come from
the environment (`HF_TOKEN`, `AWS_*`, …); a URL that holds some is refused, for records hold URLs.
"""

import os
import re
from functools import cache
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from bslora_convert.errors import InputError, reason_of
from bslora_convert.extras import need

# One slash is what is left of two once a URL has been taken for a path.
URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+]+):/+(?P<rest>[^/].*)")
HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/]+))?(/(?P<sub>.+))?")
LOCAL = ("file", "local")
BASES = ".bases"  # of a library: what its adapters share
WANTED = (
    "*.json",
    "*.jsonl",
    "*.jinja",
    "*.md",
    "*.model",
    "*.safetensors",
    "*.bin",
    "*.txt",
)  # of an adapter's directory
HELD: list["TemporaryDirectory[str]"] = []  # until the process ends


def is_url(address: object) -> bool:
    """Whether an address names a place elsewhere."""
    return URL.fullmatch(str(address)) is not None


@cache
def fetched(address: str, inner: str | None = None) -> Path:
    """The directory of an adapter's files on this machine; each address is fetched once a process.

    inner: an adapter of a library at that address, with the bases that it may share.

    :raises InputError: when it can't be fetched. :raises RecipeError: when a package is missing.
    """
    match = URL.fullmatch(address)
    if match is None:
        raise InputError(f"{address}: no URL")
    scheme, rest = match["scheme"], match["rest"].rstrip("/")
    if scheme in LOCAL:
        return Path("/") / rest / (inner or "")
    if ".." in PurePosixPath(rest).parts:
        raise InputError(f"{scheme}://{rest}: an address without .. is expected")
    return _from_hub(rest, inner) if scheme == "hf" else _from_store(scheme, rest, inner)


def _from_hub(rest: str, inner: str | None) -> Path:
    match = HUB.fullmatch(rest)
    if match is None:
        raise InputError(f"hf://{rest}: hf://org/name, with @revision and /folder if need be, is expected")
    need("hub", "hf://")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    above = f"{match['sub']}/" if match["sub"] else ""
    folder = f"{above}{inner}/" if inner else above
    patterns = [f"{folder}{kind}" for kind in WANTED] + ([f"{above}{BASES}/*"] if inner else [])
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


def _from_store(scheme: str, rest: str, inner: str | None) -> Path:
    if "?" in rest or "@" in rest.split("/")[0]:
        raise InputError(
            f"{scheme}://…: credentials belong in the environment, not in a URL that is written into records"
        )
    import fsspec

    held = TemporaryDirectory(prefix="bslora-")
    place = Path(held.name)
    try:
        filesystem, root = fsspec.core.url_to_fs(f"{scheme}://{rest}")
        wanted = [f"{root}/{inner}", f"{root}/{BASES}"] if inner else [root]
        for top in wanted:
            for name in filesystem.find(top):
                inside = PurePosixPath(name).relative_to(PurePosixPath(root))
                if ".." in inside.parts:
                    raise InputError(f"{name} leads out of it")
                path = place / inside
                path.parent.mkdir(parents=True, exist_ok=True)
                filesystem.get_file(name, str(path))
    except Exception as error:  # what a remote file system raises has no common base
        held.cleanup()
        raise InputError(f"{scheme}://{rest}: can't be fetched ({reason_of(error)})") from None
    if not (place / (inner or "")).is_dir() or not any(place.iterdir()):
        held.cleanup()
        raise InputError(f"{scheme}://{rest}: no such place, or an empty one")
    HELD.append(held)
    return place / (inner or "")
