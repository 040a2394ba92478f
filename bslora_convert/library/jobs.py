"""One adapter of a library, converted: a function of plain data that any engine can run anywhere."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from bslora_convert.behaviour.loaded import drop_base
from bslora_convert.bslora.common import found_from, is_intact, named_in
from bslora_convert.bslora.storage import WEIGHTS_NAME
from bslora_convert.errors import BsloraConvertError, InputError, Refused
from bslora_convert.files.address import STATE
from bslora_convert.files.hashing import sha256
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.landing import replace_file
from bslora_convert.files.record import FIDELITY_NAME
from bslora_convert.files.tensorfile import read_headers
from bslora_convert.library.fetch import local_copy
from bslora_convert.library.items import Item
from bslora_convert.library.rows import measured
from bslora_convert.lora.place import CONFIG_NAME
from bslora_convert.process.interrupt import heeded
from bslora_convert.results.adapter import Fidelity

COPYING = "copying"  # status of a duplicate whose copy has not landed yet


Compress = Callable[..., Fidelity]  # the verb: source, destination, recipe and settings -> its record
Work = Callable[["Job"], "Result"]


@dataclass(frozen=True, slots=True)
class Job:
    """What to convert, where to and how.

    recipe: the adapter's own (`library/options.py`), training: options by name; key: hash of all that the result depends on.
    bytes, base_bytes: of the weight files of the adapter and of the base model that its conversion runs. commons: files of
    initialisations of the library.
    """

    item: Item
    out: str
    recipe: Mapping[str, Any]
    training: Mapping[str, Any]
    key: str
    options: str
    bytes: int = 0
    base_bytes: int = 0
    html: bool = True
    commons: tuple[str, ...] = ()

    @property
    def destination(self) -> Path:
        """The adapter's own directory."""
        return Path(self.out) / self.item.id

    @property
    def marker(self) -> Path:
        """The file that says how this adapter ended."""
        return marker_of(Path(self.out), self.item.id)


@dataclass(frozen=True, slots=True)
class Result:
    """How one adapter ended, a row of the manifest.

    status: `ok`, `skipped` (done before), `failed` or `refused`. error, message: class and words of what went wrong.
    final: whether the same source would end in the same way again. options: hash of the options alone.
    prompts, base_model: the adapter's own, where its row of the library's manifest names them.
    """

    id: str
    uri: str
    status: str
    key: str
    error: str | None = None
    message: str | None = None
    source_bytes: int | None = None
    bytes: int | None = None
    parameters: int | None = None
    parameter_ratio: float | None = None
    relative_error: float | None = None
    heldout_kl: float | None = None
    seconds: float | None = None
    final: bool = False
    options: str = ""
    duplicate_of: str | None = None
    prompts: str | None = None
    base_model: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The row."""
        return asdict(self)


def marker_of(out: Path, name: str) -> Path:
    """Where an adapter's marker stands."""
    return out / STATE / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.json"


def job_key(options: str, source: str) -> str:
    """Hash of the options and of the source's content."""
    return hashlib.sha256(f"{options} {source}".encode()).hexdigest()


def convert_one(job: Job, compress: Compress) -> Result:
    """Converts one adapter and leaves a marker; never raises for what is the adapter's own fault. compress: the verb.

    The result lands by rename, its marker after it, so that a marker that says `ok` stands beside a whole result.
    """
    from bslora_convert.recipe.recipe import Recipe
    from bslora_convert.recipe.training import Training

    began = time.perf_counter()
    place = job.item.uri
    try:
        _discard_damaged(job)
        with heeded(), local_copy(job.item) as source:
            place = str(source)
            record = compress(
                source,
                job.destination,
                Recipe.from_dict(dict(job.recipe)),
                training=Training(**job.training) if job.training else None,
                recorded_as=job.item.uri,
                report_html=job.html,
                commons=[Path(path) for path in job.commons],
                overwrite=is_ours(job),
            )
        result = done(job, record)
    except BsloraConvertError as error:
        status = "refused" if isinstance(error, Refused) else "failed"
        final = isinstance(error, Refused | InputError) and place in str(error)  # the source's own fault
        result = failure(job, status, type(error).__name__, str(error), final)
    except MemoryError:
        result = failure(job, "failed", "MemoryError", "out of memory; fewer workers need less")
    except Exception as error:  # whatever it was, it is this item's and not the library's
        result = failure(job, "failed", type(error).__name__, str(error) or type(error).__name__)
    if result.status != "ok":
        drop_base()  # nobody knows what the attempt left on it
    mark(Path(job.out), result)
    return replace(result, seconds=time.perf_counter() - began)


def _discard_damaged(job: Job) -> None:
    """Removes weights of an earlier result that can't be read at all: nobody's work is in them."""
    weights = job.destination / WEIGHTS_NAME
    if weights.is_file() and is_ours(job):
        try:
            with heeded():
                read_headers(weights)
        except InputError:
            weights.unlink()


def done(job: Job, record: Fidelity) -> Result:
    """The row of a conversion that worked."""
    return replace(_row(job, "ok"), final=True, **measured(record, read_json(job.destination / CONFIG_NAME)))


def failure(job: Job, status: str, error: str, message: str, final: bool = False) -> Result:
    """The row of one that did not."""
    return replace(_row(job, status), error=error, message=message, final=final)


def _row(job: Job, status: str) -> Result:
    item = job.item
    return Result(
        item.id, item.uri, status, job.key, options=job.options, prompts=item.prompts, base_model=item.base_model
    )


def is_ours(job: Job, *copied: str) -> bool:
    """Whether what stands at the destination was made from this item, so that it may be replaced.

    A marker alone does not say so: an item that failed has one as well. copied: other sources of the same content.
    """
    return marked_ok(job.marker) or _is_made_from(job.destination, (job.item.uri, *copied))


def marked_ok(marker: Path) -> bool:
    """Whether a marker says that `batch` wrote a result."""
    try:
        return bool(json.loads(marker.read_text(encoding="utf-8"))["status"] in ("ok", COPYING))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def written_by_batch(place: Path, marker: Path) -> bool:
    """Whether a result is `batch`'s: its marker says so, or its record has the source that the marker of a failure has."""
    if marked_ok(marker):
        return True
    try:
        return _is_made_from(place, (json.loads(marker.read_text(encoding="utf-8"))["uri"],))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_made_from(place: Path, sources: Collection[str]) -> bool:
    """Whether the record of a result names one of these sources."""
    try:
        record = json.loads((place / FIDELITY_NAME).read_text(encoding="utf-8"))
        return bool(record["source"]["path"] in sources)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def mark(out: Path, result: Result) -> None:
    """Writes the marker; without one the adapter is converted again."""
    marker = marker_of(out, result.id)
    try:
        marker.parent.mkdir(parents=True, exist_ok=True)
        replace_file(marker, json.dumps(result.to_dict(), sort_keys=True) + "\n")
    except (OSError, BsloraConvertError):
        return


def _is_readable(directory: Path) -> bool:
    """Whether the file that a result's codes are against, where there is one, is where its readers look."""
    try:
        name = named_in(read_json(directory / CONFIG_NAME))
        return name is None or is_intact(found_from(directory, name))
    except BsloraConvertError:
        return False


def marked(job: Job) -> Result | None:
    """How the adapter ended before, if that was for the same key and what it left is still there."""
    try:
        result = Result(**json.loads(job.marker.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    if result.key != job.key or not result.final:
        return None
    if result.status == "ok":
        weights = job.destination / WEIGHTS_NAME
        if not weights.is_file() or weights.stat().st_size != result.bytes or not os.access(weights, os.R_OK):
            return None
        if sha256(weights) != result.settings.get("sha256") or not _is_readable(job.destination):
            return None
    return result
