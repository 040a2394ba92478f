"""`batch`: a whole library converted, resumable, with a row for every adapter.

discover -> check headers -> plan -> convert on an engine -> rows as they end -> manifest, summary and page

The markers in `OUT/.batch` are the memory: a run that was killed, or one shard of several, leaves markers, and whoever
comes next makes manifest and summary of all that are there.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from bslora_convert.behaviour.prompts import read_prompts
from bslora_convert.errors import InputError, OutputError, RecipeError
from bslora_convert.extras import need
from bslora_convert.files.address import MANIFEST, PAGE, STATE, SUMMARY
from bslora_convert.files.landing import check_apart, check_outside, landing, replace_file
from bslora_convert.library.discovery import discover
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
    options_key,
)
from bslora_convert.library.plan import Plan, plan
from bslora_convert.library.settings import Settings, read_settings, settle
from bslora_convert.library.summary import summarise
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.checks import check_choice, check_count
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.training import Training
from bslora_convert.results import Batch, BatchPlan
from bslora_convert.verbs.compress import compress


def batch(
    library: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    training: Training | None = None,
    workers: int = 1,
    engine: str = "local",
    shard: tuple[int, int] = (1, 1),
    resume: bool = True,
    retry_failed: bool = False,
    fail_fast: bool = False,
    max_failures: int | None = None,
    dry_run: bool = False,
    report_html: bool = True,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Batch | BatchPlan:
    """Converts every adapter of a library into `out/<id>` and returns what `summary.json` holds; a dry run, what would be done.

    library: a directory, a manifest or an fsspec URL. workers: processes (0: in this one). shard: (I, N), from 1.
    retry_failed: bad input of an earlier run is tried again. fail_fast, max_failures: when to give up; the rest stays undone.
    dry_run: checks every header and says what would be done. overwrite: finished results of another recipe are
    replaced.

    :raises InputError: when the library has no adapter. :raises RecipeError: for an option that is not allowed.
    :raises OutputError: when `out` can't be written, was not made by `batch`, or holds results of another recipe.
    """
    recipe = recipe or Recipe()
    _check(engine, workers, shard, max_failures)
    _check_extras(recipe, engine)
    out = Path(out).absolute()
    for file in recipe.evidence.files.values():
        read_prompts(file)
    _check_library(str(library), out)
    chosen = recipe.to_dict(), (training.to_dict() if training is not None else {})
    settings = settle(out, Settings.of(str(library), *chosen, report_html), overwrite)
    items = discover(str(library))
    _check_place(items, out)
    own = shard_of(items, shard)
    options = options_key(*chosen, report_html, settings.files)
    found = plan(
        own, out, *chosen, options, html=report_html, resume=resume, retry_failed=retry_failed, progress=progress
    )
    if dry_run:
        return _dry(found, items, own)
    _make(out)
    settings.keep(out)
    began = time.perf_counter()
    limit = 1 if fail_fast else max_failures
    rows = _run(found, out, engine, workers, limit, progress)
    gave_up = len(rows) < len(own)
    seconds = time.perf_counter() - began
    return _finish(items, rows, out, options, shard, seconds, gave_up)


def resume(out: str | Path, **where: Any) -> Batch | BatchPlan:
    """Goes on with an output of `batch` with what it was made with; where: options that change no result, as of `batch`.

    :raises InputError: when it is no output of `batch`. Raises also what `batch` raises.
    """
    known = read_settings(Path(out).absolute())
    if known is None:
        raise InputError(f"{out}: nothing to go on with: it was not made by `batch`")
    return batch(
        known.library,
        out,
        Recipe.from_dict(dict(known.recipe)),
        training=Training(**known.training) if known.training else None,
        report_html=known.report_html,
        **where,
    )


def _run(
    found: Plan, out: Path, engine: str, workers: int, max_failures: int | None, progress: Progress
) -> list[Result]:
    """Rows of every item of this run, each written to the manifest as it ends."""
    rows: list[Result] = []
    failures = 0
    total = len(found.jobs) + len(found.known) + sum(map(len, found.duplicates.values()))
    with (out / MANIFEST).open("a", encoding="utf-8") as manifest:

        def take(result: Result) -> None:
            rows.append(result)
            manifest.write(json.dumps(result.to_dict()) + "\n")
            manifest.flush()
            progress("converting", len(rows), total)

        for result in found.known:
            if result.status != "skipped":
                mark(out, result)
                failures += 1
            take(result)
        jobs = {job.item.id: job for job in found.jobs}
        if max_failures is not None and failures >= max_failures:
            return rows
        with closing(ENGINES[engine](partial(convert_one, compress=compress), found.jobs, workers)) as results:
            for result in results:
                if result.error == "WorkerDied":
                    mark(out, result)
                take(result)
                for job in found.duplicates.get(result.id, ()):
                    take(_copy(jobs[result.id], job, result))
                failures += result.status == "failed"
                if max_failures is not None and failures >= max_failures:
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
                shutil.copytree(first.destination, place, dirs_exist_ok=True)
        except (OSError, OutputError) as error:
            same = failure(job, "failed", "OutputError", str(error))
    mark(Path(job.out), same)
    return same


def _finish(
    items: Sequence[Item],
    rows: Sequence[Result],
    out: Path,
    options: str,
    shard: tuple[int, int],
    seconds: float,
    gave_up: bool,
) -> Batch:
    """Manifest, summary and page of everything that is done, this run's and earlier ones' with the same options."""
    from bslora_convert.report import library as report

    mine = {row.id: row for row in rows}
    everyone = [mine.get(item.id) or _known(out, item.id, options) for item in items]
    final = [row for row in everyone if row is not None]
    replace_file(out / MANIFEST, "".join(json.dumps(row.to_dict()) + "\n" for row in final))
    summary = summarise(final, len(items), seconds if shard == (1, 1) else None)
    bad = sum(row.status in ("failed", "refused") for row in rows)
    summary["run"] = {"shard": f"{shard[0]}/{shard[1]}", "items": len(rows), "bad": bad, "gave_up": gave_up}
    replace_file(out / SUMMARY, json.dumps(summary, indent=1) + "\n")
    replace_file(out / PAGE, report.render(summary, [row.to_dict() for row in final]))
    return cast(Batch, summary)


def _known(out: Path, name: str, options: str) -> Result | None:
    """The marker that another run or shard with the same options left for an item that this run did not come to."""
    with suppress(OSError, ValueError, TypeError):
        result = Result(**json.loads(marker_of(out, name).read_text(encoding="utf-8")))
        return result if result.options == options and result.status != COPYING else None
    return None


def _dry(found: Plan, items: Sequence[Item], own: Sequence[Item]) -> BatchPlan:
    """What a run would do."""
    return {
        "dry_run": True,
        "items": len(items),
        "in_this_shard": len(own),
        "to_convert": len(found.jobs),
        "duplicates": sum(map(len, found.duplicates.values())),
        "done": sum(result.status == "skipped" for result in found.known),
        "bytes": found.bytes,
        "bad": [result.to_dict() for result in found.known if result.status != "skipped"],
    }


def _check(engine: str, workers: int, shard: tuple[int, int], max_failures: int | None) -> None:
    check_choice("engine", engine, ENGINES)
    if workers < 0:
        raise RecipeError(f"workers is {workers}: a whole number from 0 is allowed", "workers")
    index, count = shard
    if not 1 <= index <= count:
        raise RecipeError(f"shard is {index}/{count}: I/N with I from 1 to N is allowed", "shard")
    check_count("max_failures", max_failures)


def _check_extras(recipe: Recipe, engine: str) -> None:
    """Once for the library, instead of once for each adapter."""
    if engine == "ray":
        need("ray", "engine ray", "engine")
    if recipe.form.groups == "auto":
        need("analysis", "groups auto", "groups")
    if recipe.evidence.base_model is not None:
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


def is_failed(summary: Mapping[str, Any]) -> bool:
    """Whether a batch ends with exit code 1."""
    return bool(summary["run"]["bad"] or summary["run"]["gave_up"])
