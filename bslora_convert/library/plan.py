"""What is to be done: every item's headers checked, duplicates found, and what is done already set aside."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from bslora_convert.bslora.official import is_official
from bslora_convert.errors import BsloraConvertError, InputError, Refused
from bslora_convert.files.base import base_bytes
from bslora_convert.files.hashing import sha256
from bslora_convert.files.store import Store
from bslora_convert.files.travel import travelling
from bslora_convert.library.fetch import at_revision
from bslora_convert.library.items import Item
from bslora_convert.library.jobs import Job, Result, failure, job_key, marked
from bslora_convert.library.made_with import MadeWith
from bslora_convert.library.options import BASE, own_options, prompts_hash, recipe_of
from bslora_convert.lora.adapter import CONFIG_NAME, load_lora, locate
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.batching import BatchOptions
from bslora_convert.recipe.reading import Reading


@dataclass(frozen=True, slots=True)
class LibraryPlan:
    """Jobs to run; what is known without running (done before, bad input); duplicates by the job whose result they copy."""

    jobs: tuple[Job, ...]
    known: tuple[Result, ...]
    duplicates: Mapping[str, tuple[Job, ...]]

    @property
    def bytes(self) -> int:
        """Weights that the jobs read."""
        return sum(job.bytes for job in self.jobs)


def plan_library(
    items: Sequence[Item], out: Path, made_with: MadeWith, asked: BatchOptions, progress: Progress = silent
) -> LibraryPlan:
    """Looks at every item: its headers, and a hash of its files."""
    recipe, options = made_with.recipe, made_with.key
    hash_of = cache(prompts_hash)  # many adapters may name one file
    jobs: list[Job] = []
    known: list[Result] = []
    first: dict[str, Job] = {}
    duplicates: dict[str, list[Job]] = {}
    for done, item in enumerate(items):
        progress("checking headers", done, len(items))
        unread = job_key(options, f"unread {item.uri}")
        job = Job(item, str(out), recipe, made_with.training, unread, options, html=made_with.report_html)
        try:
            own = recipe_of(item, recipe)
            source, size = _look(item, own, hash_of)
            job = replace(job, recipe=own, base_bytes=base_bytes(own.get(BASE)))
        except BsloraConvertError as error:
            status = "refused" if isinstance(error, Refused) else "failed"
            known.append(failure(job, status, type(error).__name__, str(error)))
            continue
        except Exception as error:  # unreadable files, what remote file systems raise: this item's, not the library's
            known.append(
                failure(job, "failed", type(error).__name__, f"{item.id}: can't be read ({type(error).__name__})")
            )
            continue
        job = replace(job, key=job_key(options, source), bytes=size)
        before = marked(job) if asked.resume else None
        if before is not None and (before.status == "ok" or not asked.retry_failed):
            row = replace(before, prompts=item.prompts, base_model=item.base_model)
            known.append(replace(row, status="skipped") if row.status == "ok" else row)
        elif job.key in first:
            duplicates.setdefault(first[job.key].item.id, []).append(job)
        else:
            first[job.key] = job
            jobs.append(job)
    jobs.sort(key=lambda job: job.recipe.get(BASE) or "")  # those of one base in a row: it is read once
    return LibraryPlan(tuple(jobs), tuple(known), {name: tuple(same) for name, same in duplicates.items()})


def _look(item: Item, recipe: Mapping[str, Any], hash_of: Callable[[str], str]) -> tuple[str, int]:
    """(Hash of the source and of the adapter's own options, bytes of its weights), its headers checked where it is local.

    A remote one is known by what its file system says of its files, and checked when it is fetched.

    :raises InputError: when it is damaged. :raises Refused: when it can't be converted.
    """
    own = own_options(item, hash_of)
    if item.is_remote:
        source, size = _look_remote(item)
        return f"{source} {own}".rstrip(), size
    directory, weights = locate(Path(item.uri))
    if not is_official(item.uri):
        load_lora(item.uri, headers_only=True, **Reading.arguments_in(recipe))
    names = (CONFIG_NAME, *travelling(directory))
    said = " ".join((sha256(weights), *(f"{name} {sha256(directory / name)}" for name in names), own))
    return said.rstrip(), weights.stat().st_size


def _look_remote(item: Item) -> tuple[str, int]:
    store = Store.at(at_revision(item))
    try:
        files = store.filesystem.ls(store.root, detail=True)
        stamps = sorted(
            f"{file['name']} {store.filesystem.ukey(file['name'])}" for file in files if file["type"] == "file"
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{item.id}: can't be listed ({type(error).__name__})") from None
    digest = hashlib.sha256("\n".join(stamps).encode()).hexdigest()
    return f"{item.uri} {item.revision} {digest}", max((file.get("size") or 0 for file in files), default=0)
