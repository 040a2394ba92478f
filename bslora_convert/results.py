"""What the verbs return, which is what they write as JSON.

Sizes in bytes, times in seconds, KL in nats a token, shares from 0 to 1.
"""

from typing import Any, NotRequired, TypedDict


class SourceRecord(TypedDict):
    """The LoRA that was converted. ranks: modules of each. width: Σ (out + in) over its modules."""

    path: str
    sha256: str
    bytes: int
    parameters: int
    modules: int
    ranks: dict[str, int]
    width: int
    dtype: str


class CompactRecord(TypedDict):
    """What was written. loaded_bytes: once decoded, of an adapter in codes."""

    transform: str
    ranks: dict[str, Any]
    shared_size: int | None
    bytes: int
    parameters: int
    parameters_by_part: dict[str, int]
    parameter_ratio: float
    byte_ratio: float
    expanded_rank: int
    unique_tensors: int
    dtype: str
    sha256: str
    loaded_bytes: NotRequired[int]


class WeightRecord(TypedDict):
    """How near it is: see `conversion.fidelity`. gain: Σ⟨ΔW, ΔŴ⟩ / Σ‖ΔW‖²."""

    relative_error: float
    energy_kept: float
    cosine: float
    gain: float
    components: dict[str, float]
    modules: list[dict[str, Any]]


class AimRecord(TypedDict):
    """What the result had to reach, every size that was tried for a behaviour, and what it does on the rows that prove."""

    asked: dict[str, Any]
    path: list[dict[str, Any]]
    proofs: list[dict[str, Any]]


class Fidelity(TypedDict):
    """`fidelity.json`: what `compress` and `finetune` return. functional: what `verify --save` found, None before."""

    schema_version: int
    tool_version: str
    source: SourceRecord
    recipe: dict[str, Any]
    compact: CompactRecord
    weight: WeightRecord
    baselines: dict[str, dict[str, float]]
    aim: AimRecord
    functional: dict[str, Any] | None
    notes: list[str]
    seconds: dict[str, float | None]
    files: dict[str, dict[str, Any]]
    coding: NotRequired[dict[str, Any]]
    evidence: NotRequired[dict[str, Any]]
    training: NotRequired[dict[str, Any]]
    deduplication: NotRequired[dict[str, int]]


class Inspection(TypedDict):
    """What `inspect` returns. sizes: forecasts, of a LoRA. integrity: whether what is compact is what was written."""

    kind: str
    convertible: bool
    reasons: list[str]
    base_model: str | None
    modules: int
    parameters: int
    bytes: int
    bytes_by_part: dict[str, int]
    ranks: dict[str, int] | None
    expanded_rank: int | None
    slot_bytes: dict[str, int]
    dtype: NotRequired[str]
    kinds: NotRequired[list[dict[str, Any]]]
    spectra: NotRequired[list[dict[str, Any]]]
    sizes: NotRequired[list[dict[str, Any]]]
    transform: NotRequired[str]
    shared_ranks: NotRequired[dict[str, int]]
    integrity: NotRequired[str]
    notes: NotRequired[list[str]]


class Verification(TypedDict):
    """`verify.json`: what `verify` returns. Measures on prompts are None where only tasks were run; intervals of 95 %."""

    schema_version: int
    base_model: str
    compact: dict[str, str]
    reference: dict[str, str]
    dtype: str
    device: str
    prompts: dict[str, Any] | None
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
    generation: dict[str, float] | None
    worst: list[dict[str, Any]]
    tasks: dict[str, dict[str, Any]]
    thresholds: dict[str, dict[str, Any]]
    passed: bool
    notes: list[str]


class Comparison(TypedDict):
    """`comparison.json`: what `compare` returns, a row for every form and size."""

    schema_version: int
    tool_version: str
    source: dict[str, Any]
    dtype: str
    rows: list[dict[str, Any]]
    files: NotRequired[dict[str, dict[str, Any]]]


class Expanded(TypedDict):
    """What `expand` returns. original: the error against the LoRA, where it is known. served: a server's slot, if any."""

    schema_version: int
    tool_version: str
    source: dict[str, str]
    format: str
    engine: str | None
    modules: int
    ranks: dict[str, int]
    parameters: int
    bytes: int
    relative_error: float
    original: dict[str, float] | None
    served: dict[str, Any] | None
    dtype: str
    base_model: str | None
    notes: list[str]
    files: dict[str, dict[str, Any]]


class Analysis(TypedDict):
    """`analysis.json`: what `analyze` returns. activations: entropy similarity of outputs, where prompts were given."""

    schema_version: int
    tool_version: str
    source: dict[str, Any]
    modules: list[dict[str, Any]]
    ranks: dict[str, Any]
    rmi_within: dict[str, dict[str, Any]]
    rmi_across: dict[str, Any]
    subspaces_within: list[dict[str, Any]]
    subspaces_across: list[dict[str, Any]]
    shared_energy: dict[str, Any]
    draws: int
    shared_initialisation: dict[str, Any]
    groups: dict[str, Any]
    sizes: list[dict[str, Any]]
    recommendation: list[str]
    activations: NotRequired[dict[str, Any]]
    files: NotRequired[dict[str, dict[str, Any]]]


class Batch(TypedDict):
    """`summary.json`: what `batch` returns. serving: a server's slots before and after."""

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
    byte_ratio: float | None
    relative_error: dict[str, float] | None
    errors: dict[str, int]
    seconds: float | None
    adapters_per_second: float | None
    source_bytes_per_second: float | None
    run: dict[str, Any]
    serving: NotRequired[dict[str, Any]]


class BatchPlan(TypedDict):
    """What `batch` returns with `dry_run`: what a run would do. bad: rows of what could not be converted."""

    dry_run: bool
    items: int
    in_this_shard: int
    to_convert: int
    duplicates: int
    done: int
    bytes: int
    bad: list[dict[str, Any]]


class Capacity(TypedDict):
    """What `capacity` returns: adapters by an engine's slots, and by engines that keep each one's own bytes."""

    gpu_gib: float
    base_gib: float
    slots: dict[str, dict[str, Any]]
    paged: dict[str, dict[str, Any]]
    resident: dict[str, int]


class LibraryVerification(TypedDict):
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


class LibraryExpansion(TypedDict):
    """What `expand_library` returns: a row for each adapter, and the largest rank and slot of them all."""

    library: str
    rows: list[dict[str, Any]]
    adapters: int
    bad: int
    bytes: int
    rank: int | None
    served: dict[str, int | None] | None
    notes: list[str]
