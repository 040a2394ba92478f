"""Results onto the Hub: the files of a directory, many adapters a commit, each adapter whole in one.

A commit takes at most 100 files here, as the Hub advises, and never parts the files of one directory unless they are more.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bslora_convert.errors import InputError, OutputError, RecipeError, reason_of
from bslora_convert.extras import need

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MOST = 100  # files of a commit


def check_push(repo: str, dry_run: bool = False) -> None:
    """Refuses a place that can't be pushed to, before any work is done.

    :raises RecipeError: for a name that is none, or when a package is missing. :raises InputError: when nobody is logged in.
    """
    if not REPO.fullmatch(repo):
        raise RecipeError(f"push is {repo!r}: org/name is expected", "push")
    need("hub", "push", "push")
    if dry_run:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(f"{repo}: nobody is logged in to the Hub; `hf auth login`, or set HF_TOKEN")


def push(place: Path, repo: str, *, beside: Mapping[str, Path] | None = None, dry_run: bool = False) -> dict[str, Any]:
    """Uploads a result, or all results of a library, under the paths that they have there; nothing with `dry_run`.

    beside: further files by the name that they get, which the result needs and which lie elsewhere.

    Returns `repo`, `files`, `bytes`, `commits` (their hashes, empty for a dry run) and `dry_run`. A repository that is not there
    is made, private as the account says.

    :raises OutputError: when it can't be uploaded; what is here stays.
    """
    paths = {name: place / name for name in sorted(files_of(place))} | dict(beside or {})
    record: dict[str, Any] = {
        "repo": repo,
        "files": len(paths),
        "bytes": sum(path.stat().st_size for path in paths.values()),
        "commits": [],
        "dry_run": dry_run,
    }
    if dry_run:
        return record
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="bslora-convert")
    try:
        api.create_repo(repo, exist_ok=True)
        parts = list(commits(list(paths)))
        for number, part in enumerate(parts, 1):
            done = api.create_commit(
                repo,
                [CommitOperationAdd(name, paths[name]) for name in part],
                commit_message=f"bslora-convert: {len(part)} files"
                + (f" ({number}/{len(parts)})" if len(parts) > 1 else ""),
            )
            record["commits"] = [*record["commits"], done.oid]
    except Exception as error:  # what the hub's client raises has no common base
        raise OutputError(
            f"{place}: written here, but not pushed to {repo} ({reason_of(error)}); go on with `hf upload {repo} {place}`"
        ) from None
    return record


def files_of(place: Path) -> Iterator[str]:
    """Every file of a result by its path there; hidden ones, a batch's own state among them, stay here."""
    for path in place.rglob("*"):
        parts = path.relative_to(place).parts
        if path.is_file() and not path.is_symlink() and not any(p.startswith(".") for p in parts):
            yield "/".join(parts)


def commits(files: Sequence[str]) -> Iterator[list[str]]:
    """The files in parts of at most `MOST`, those of one directory together as long as they are no more."""
    folders: dict[str, list[str]] = {}
    for name in files:
        folders.setdefault(name.rpartition("/")[0], []).append(name)
    part: list[str] = []
    for held in folders.values():
        if part and len(part) + len(held) > MOST:
            yield part
            part = []
        part = [*part, *held]
        while len(part) > MOST:
            yield part[:MOST]
            part = part[MOST:]
    if part:
        yield part
