"""Records of a library: planned, converted, expanded, and how much of it fits a GPU."""

from typing import Any

from bslora_convert.results.adapter import ServedRecord
from bslora_convert.results.record import Record, record


@record
class RunRecord(Record):
    """One run of `batch`. gave_up: whether it stopped before the end."""

    shard: str
    items: int
    bad: int
    gave_up: bool


@record
class BatchSummary(Record):
    """`summary.json`: what `batch` returns. serving: a server's slots before and after.

    bytes_after: of all results, and of the initialisations that they have in common, which are bytes_in_common. behaviour: how
    many adapters were measured, and how the measures spread. bases: adapters by base model. left_over: results whose source left
    the library; pruned: those that were removed. notes: what was left out of the library, or lies elsewhere, each in a line.
    """

    schema_version: int
    items: int
    ok: int
    skipped: int
    failed: int
    refused: int
    pending: int
    duplicates: int
    bytes_before: int
    bytes_after: int
    bytes_in_common: int = 0
    byte_ratio: float | None
    relative_error: dict[str, float] | None
    errors: dict[str, int]
    seconds: float | None
    adapters_per_second: float | None
    source_bytes_per_second: float | None
    serving: dict[str, Any] | None = None
    behaviour: dict[str, Any] | None = None
    bases: dict[str, int]
    left_over: list[str]
    pruned: list[str]
    notes: list[str]
    tool_version: str
    run: RunRecord

    @property
    def is_failed(self) -> bool:
        """Whether a batch ends with exit code 1."""
        return bool(self.run.bad or self.run.gave_up)


@record
class BatchPlan(Record):
    """What `batch` returns with `dry_run`: what a run would do. bad: rows of what could not be converted."""

    dry_run: bool
    items: int
    in_this_shard: int
    to_convert: int
    duplicates: int
    done: int
    bytes: int
    bad: list[dict[str, Any]]
    left_over: list[str]
    notes: list[str]

    @property
    def is_failed(self) -> bool:
        """Whether a batch ends with exit code 1."""
        return bool(self.bad)


@record
class Capacity(Record):
    """What `capacity` returns: adapters by an engine's slots, and by engines that keep each one's own bytes."""

    gpu_gib: float
    base_gib: float
    slots: dict[str, dict[str, Any]]
    paged: dict[str, dict[str, Any]]
    resident: dict[str, int]


@record
class LibraryExpansion(Record):
    """What `expand_library` returns: a row for each adapter, and the largest rank and slot of them all."""

    library: str
    rows: list[dict[str, Any]]
    adapters: int
    bad: int
    bytes: int
    rank: int | None
    served: ServedRecord | None
    notes: list[str]


@record
class Pushed(Record):
    """What `push` returns. commits: their hashes, none of a dry run. names: what the files are called in the repository."""

    repo: str
    files: int
    bytes: int
    commits: list[str]
    dry_run: bool
    names: list[str]


@record
class ServerRecord(Record):
    """Whom a server would refuse: `id` and `why` of each. needed_rank: the least --max-lora-rank that takes all tenants."""

    base_model: str
    max_lora_rank: int | None
    needed_rank: int | None
    refused: list[dict[str, Any]]


@record
class LibraryInspection(Record):
    """What `inspect` says of a library: a row for each tenant, and what they say together. damaged: ids.

    bases: tenants by what they call their base model. behaviour: as of `BatchSummary`. server: where one was asked about.
    """

    kind: str
    library: str
    adapters: int
    bases: dict[str, int]
    bytes: int
    source_bytes: int
    serving: dict[str, Any] | None
    behaviour: dict[str, Any] | None
    damaged: list[str]
    rows: list[dict[str, Any]]
    server: ServerRecord | None
    notes: list[str]

    @property
    def is_failed(self) -> bool:
        """Whether `inspect` ends with exit code 1: a server that was asked about would refuse somebody."""
        return self.server is not None and bool(self.server.refused)
