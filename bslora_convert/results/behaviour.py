"""Records of behaviour: what `verify` finds of one adapter, and of a library."""

from typing import Any

from bslora_convert.results.record import Record, record


@record
class AdapterRecord(Record):
    """One of the two adapters that are compared."""

    path: str
    kind: str
    sha256: str


@record
class PromptsRecord(Record):
    """The rows that were measured. cut: to the context. completions_written: by the reference."""

    rows: int
    tokens: int
    sha256: str
    cut: int
    completions_written: int


@record
class GenerationRecord(Record):
    """Greedy texts of both adapters compared."""

    rows: int
    exact_match: float
    rouge_l: float


@record
class TaskRecord(Record):
    """One task's scores, and the 95 % interval of compact − reference over its items."""

    metric: str
    items: int
    base: float
    reference: float
    compact: float
    difference_ci95: list[float]


@record
class ThresholdRecord(Record):
    """A limit, and the value that meets or misses it."""

    limit: float
    value: float
    passed: bool


@record
class Verification(Record):
    """`verify.json`: what `verify` returns. Measures on prompts are None where only tasks were run; intervals of 95 %.

    when: the day, UTC.
    """

    schema_version: int
    when: str | None = None
    base_model: str
    compact: AdapterRecord
    reference: AdapterRecord
    dtype: str
    device: str
    prompts: PromptsRecord | None
    kl: float | None
    kl_ci95: list[float] | None
    kl_p99: float | None
    agreement: float | None
    agreement_ci95: list[float] | None
    nll: dict[str, float] | None
    perplexity: dict[str, float] | None
    base_kl: float | None
    retention: float | None
    retention_ci95: list[float] | None
    hidden_error: float | None
    generation: GenerationRecord | None
    worst: list[dict[str, Any]]
    tasks: dict[str, TaskRecord]
    notes: list[str]
    thresholds: dict[str, ThresholdRecord]
    passed: bool


@record
class LibraryVerification(Record):
    """What `verify_library` returns: a row for each adapter, worst retention first, and how the measures spread over them."""

    schema_version: int
    library: str
    rows: list[dict[str, Any]]
    adapters: int
    bad: list[str]
    missed: list[str]
    retention: dict[str, float] | None
    kl: dict[str, float] | None
    agreement: dict[str, float] | None
    passed: bool
    notes: list[str]
