"""Results onto the Hub: the files of a directory, many adapters a commit, each adapter whole in one.

A commit takes at most 100 files here, as the Hub advises, and never parts the files of one directory unless they are more.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bslora_convert.errors import InputError, OutputError, RecipeError, reason_of
from bslora_convert.extras import need
from bslora_convert.results.library import Pushed

REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MOST = 100  # files of a commit
Content = Path | bytes


def check_push(repo: str, dry_run: bool = False) -> None:
    """Refuses a place that can't be pushed to, before any work is done.

    :raises RecipeError: for a name that is none, or when a package is missing. :raises InputError: when nobody is logged in.
    """
    if not REPO.fullmatch(repo):
        raise RecipeError(f"the repository is {repo!r}: org/name is expected")
    need("hub", "push")
    if dry_run:
        return
    from huggingface_hub import get_token

    if get_token() is None:
        raise InputError(f"{repo}: nobody is logged in to the Hub; `hf auth login`, or set HF_TOKEN")


def upload(contents: Mapping[str, Content], repo: str, *, dry_run: bool = False) -> Pushed:
    """Uploads files by the names that they get in a repository; nothing with `dry_run`.

    A repository that is not there is made, private as the account says.

    :raises OutputError: when they can't be uploaded.
    """
    record = Pushed(
        repo=repo,
        files=len(contents),
        bytes=sum(len(one) if isinstance(one, bytes) else one.stat().st_size for one in contents.values()),
        commits=[],
        dry_run=dry_run,
        names=sorted(contents),
    )
    if dry_run:
        return record
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="bslora-convert")
    try:
        api.create_repo(repo, exist_ok=True)
        parts, done = list(commits(sorted(contents))), []
        for number, part in enumerate(parts, 1):
            made = api.create_commit(
                repo,
                [CommitOperationAdd(name, contents[name]) for name in part],
                commit_message=f"bslora-convert: {len(part)} files"
                + (f" ({number}/{len(parts)})" if len(parts) > 1 else ""),
            )
            done.append(made.oid)
    except Exception as error:  # what the hub's client raises has no common base
        raise OutputError(f"{repo}: not pushed whole ({reason_of(error)}); the same command goes on") from None
    return replace(record, commits=done)


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
