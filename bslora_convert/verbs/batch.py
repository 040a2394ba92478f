"""`batch`: a whole library converted, resumable, with a row for every adapter.

discover -> check headers -> plan -> convert on an engine -> rows as they end -> manifest, summary and page

The markers in `OUT/.batch` are the memory: a run that was killed, or one shard of several, leaves markers, and whoever
comes next makes manifest and summary of all that are there.
"""

import json
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bslora_convert.behaviour.prompts import read_prompts
from bslora_convert.bslora.common import commons_in
from bslora_convert.bslora.storage import WEIGHTS_NAME
from bslora_convert.errors import InputError, OutputError
from bslora_convert.extras import need
from bslora_convert.files.address import STATE
from bslora_convert.files.landing import check_apart, check_outside, copy_files, landing
from bslora_convert.files.store import is_url
from bslora_convert.library.common import commons_of
from bslora_convert.library.discovery import Discovery, discover
from bslora_convert.library.engines import ENGINES
from bslora_convert.library.items import Item, shard_of
from bslora_convert.library.jobs import (
    COPYING,
    Job,
    Result,
    convert_one,
    failure,
    is_ours,
    mark,
    marker_of,
)
from bslora_convert.library.leftover import left_over, prune
from bslora_convert.library.made_with import MadeWith, read_made_with, settle
from bslora_convert.library.manifest import append
from bslora_convert.library.plan import LibraryPlan, plan_library
from bslora_convert.library.summary import summarise
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.batching import BatchOptions
from bslora_convert.recipe.options import built
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.training import Training
from bslora_convert.report.library_files import write
from bslora_convert.results.library import BatchPlan, BatchSummary, RunRecord
from bslora_convert.verbs.compress import compress


def batch(
    library: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    training: Training | None = None,
    options: BatchOptions | None = None,
    *,
    progress: Progress = silent,
    **fields: Any,
) -> BatchSummary | BatchPlan:
    """Converts every adapter of a library into `out/<id>` and returns what `summary.json` holds; a dry run, what would be done.

    library: a directory, a manifest or an fsspec URL. options, or fields of `BatchOptions`: where jobs run, what is done again,
    when to give up.

    :raises InputError: when the library has no adapter. :raises RecipeError: for an option that is not allowed.
    :raises OutputError: when `out` can't be written, was not made by `batch`, or holds results of another recipe.
    """
    recipe, asked, out = recipe or Recipe(), built(BatchOptions, options, fields), Path(out).absolute()
    if recipe.storage.begins is not None and not is_url(recipe.storage.begins):
        recipe = recipe.but(init=str(Path(recipe.storage.begins).absolute()))  # a run that goes on may stand elsewhere
    _check_extras(recipe, asked.engine)
    for file in recipe.calibration.files.values():
        read_prompts(file)
    _check_library(str(library), out)
    options_used = recipe.to_dict(), (training.to_dict() if training is not None else {})
    made_with = MadeWith.of(str(library), *options_used, asked.report_html)
    settle(out, made_with, asked.overwrite)
    everything = discover(str(library))
    items = everything.items
    _check_place(items, out)
    own = shard_of(items, asked.shard)
    found = plan_library(own, out, made_with, asked, progress)
    if asked.dry_run:
        return _dry(found, everything, own, out)
    _make(out)
    made_with.keep(out)
    began = time.perf_counter()
    commons = tuple(map(str, commons_of(found.jobs, out, recipe, progress)))
    found = replace(found, jobs=tuple(replace(job, commons=commons) for job in found.jobs))
    rows = _run(found, out, asked, progress)
    seconds = time.perf_counter() - began if asked.shard == (1, 1) else None
    index, count = asked.shard
    run = RunRecord(
        shard=f"{index}/{count}",
        items=len(rows),
        bad=sum(row.status in ("failed", "refused") for row in rows),
        gave_up=len(rows) < len(own),
    )
    final = _final(items, rows, out, made_with.key)
    named = {row.settings.get("initialisation") for row in final}
    in_common = sum(path.stat().st_size for path in commons_in(out) if path.name in named)
    left = left_over(out, {item.id for item in items})
    pruned, kept = prune(out, left, everything.lost) if asked.prune else ([], [])
    older = sum(row.options != made_with.key for row in final)
    summary = summarise(final, len(items), seconds, run, in_common, [*everything.notes, *kept])
    summary = replace(summary, pending=summary.pending + older, skipped=summary.skipped - older)
    left = [name for name in left if name not in pruned]
    return write(out, [row.to_dict() for row in final], replace(summary, left_over=left, pruned=pruned))


def resume(
    out: str | Path, options: BatchOptions | None = None, *, progress: Progress = silent, **fields: Any
) -> BatchSummary | BatchPlan:
    """Goes on with an output of `batch` with what it was made with; options: those that change no result, as of `batch`.

    :raises InputError: when it is no output of `batch`. Raises also what `batch` raises.
    """
    known = read_made_with(Path(out).absolute())
    if known is None:
        raise InputError(f"{out}: nothing to go on with: it was not made by `batch`")
    asked = built(BatchOptions, options, {**fields, "report_html": known.report_html})
    training = Training(**known.training) if known.training else None
    return batch(known.library, out, Recipe.from_dict(dict(known.recipe)), training, asked, progress=progress)


def _run(found: LibraryPlan, out: Path, asked: BatchOptions, progress: Progress) -> list[Result]:
    """Rows of every item of this run, each written to the manifest as it ends."""
    rows: list[Result] = []
    failures, most = 0, asked.failures
    total = len(found.jobs) + len(found.known) + sum(map(len, found.duplicates.values()))

    def take(result: Result) -> None:
        rows.append(result)
        append(out, result.to_dict())
        progress("converting", len(rows), total, f"{result.id} {result.status}")

    progress("converting", 0, total)
    for result in found.known:
        if result.status != "skipped":
            mark(out, result)
            failures += 1
        take(result)
    jobs = {job.item.id: job for job in found.jobs}
    if most is not None and failures >= most:
        return rows
    with closing(ENGINES[asked.engine](partial(convert_one, compress=compress), found.jobs, asked.workers)) as results:
        for result in results:
            if result.error == "WorkerDied":
                mark(out, result)
            take(result)
            for job in found.duplicates.get(result.id, ()):
                take(_copy(jobs[result.id], job, result))
            failures += result.status == "failed"
            if most is not None and failures >= most:
                break
    return rows


def _copy(first: Job, job: Job, result: Result) -> Result:
    """The same source under another id: the same result, copied."""
    item = job.item
    same = replace(result, id=item.id, uri=item.uri, duplicate_of=first.item.id, prompts=item.prompts, seconds=None)
    if result.status == "ok":
        try:
            ours = is_ours(job, first.item.uri)
            mark(
                Path(job.out), replace(same, status=COPYING, final=False)
            )  # whoever comes after a kill knows it is ours
            with landing(job.destination, overwrite=ours) as place:
                copy_files(first.destination, place)
        except (OSError, OutputError) as error:
            same = failure(job, "failed", "OutputError", str(error))
    mark(Path(job.out), same)
    return same


def _final(items: Sequence[Item], rows: Sequence[Result], out: Path, options: str) -> list[Result]:
    """A row for everything that is done, by this run and by earlier ones with the same options."""
    mine = {row.id: row for row in rows}
    everyone = [mine.get(item.id) or _known(out, item.id, options) for item in items]
    return [row for row in everyone if row is not None]


def _known(out: Path, name: str, options: str) -> Result | None:
    """The marker that another run or shard left for an item that this run did not come to.

    One of other options counts as long as its result stands there: it is a tenant until it is converted anew.
    """
    with suppress(OSError, ValueError, TypeError):
        result = Result(**json.loads(marker_of(out, name).read_text(encoding="utf-8")))
        if result.options == options:
            return result if result.status != COPYING else None
        weights = out / name / WEIGHTS_NAME
        if result.status == "ok" and weights.is_file() and weights.stat().st_size == result.bytes:
            return replace(result, status="skipped")
    return None


def _dry(found: LibraryPlan, everything: Discovery, own: Sequence[Item], out: Path) -> BatchPlan:
    """What a run would do."""
    return BatchPlan(
        dry_run=True,
        items=len(everything.items),
        in_this_shard=len(own),
        to_convert=len(found.jobs),
        duplicates=sum(map(len, found.duplicates.values())),
        done=sum(result.status == "skipped" for result in found.known),
        bytes=found.bytes,
        bad=[result.to_dict() for result in found.known if result.status != "skipped"],
        left_over=left_over(out, {item.id for item in everything.items}),
        notes=everything.notes,
    )


def _check_extras(recipe: Recipe, engine: str) -> None:
    """Once for the library, instead of once for each adapter."""
    if engine == "ray":
        need("ray", "engine ray", "engine")
    if recipe.structure.groups == "auto":
        need("analysis", "groups auto", "groups")
    if recipe.calibration.runs:
        need("base", "base_model", "base_model")


def _check_place(items: Sequence[Item], out: Path) -> None:
    """Refuses an output that would lie in a source, or a source in the output."""
    target = out.resolve()
    for item in items:
        if not item.is_remote:
            source = Path(item.uri).resolve()
            if source == target or source in target.parents or target in source.parents:
                raise InputError(f"{out}: the output and {item.uri} lie inside of each other")


def _check_library(library: str, out: Path) -> None:
    """Refuses an output in the library or a library in the output, whose results would become adapters of the next run.

    :raises InputError: naming both. :raises OutputError: for a place that no run may write to.
    """
    check_outside(out)
    path = Path(library)
    if "://" not in library and path.is_dir():
        check_apart(path, out)
    elif "://" not in library and path.is_file() and out.resolve() in path.resolve().parents:
        raise InputError(f"{out}: the output holds the manifest {library}; give another directory")


def _make(out: Path) -> None:
    try:
        (out / STATE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out}: can't be written ({error.strerror or error})") from error
