"""Records of one adapter: converted, described, expanded."""

from typing import Any

from bslora_convert.results.behaviour import Verification
from bslora_convert.results.record import Files, Record, record


@record
class SourceRecord(Record):
    """The LoRA that was converted. ranks: modules of each. width: Σ (out + in) over its modules. card: of its model card."""

    path: str
    sha256: str
    bytes: int
    parameters: int
    modules: int
    ranks: dict[str, int]
    width: int
    dtype: str
    card: dict[str, Any] | None = None

    @property
    def largest_rank(self) -> int:
        """The largest rank of a module."""
        return max(map(int, self.ranks))


@record
class CompactRecord(Record):
    """What was written. bytes: of the weight file, config_bytes: of the configuration, loaded_bytes: decoded, where in codes."""

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
    config_bytes: int | None = None
    loaded_bytes: int | None = None
    sha256: str


@record
class ModuleRecord(Record):
    """One module. energy: ‖ΔW‖²."""

    name: str
    relative_error: float
    energy: float
    local_rank: int


@record
class WeightRecord(Record):
    """How near it is: see `conversion.fidelity`. gain: Σ⟨ΔW, ΔŴ⟩ / Σ‖ΔW‖²."""

    relative_error: float
    energy_kept: float
    cosine: float
    gain: float
    components: dict[str, float]
    modules: list[ModuleRecord]

    @property
    def energy(self) -> float:
        """‖ΔW‖² over all modules."""
        return sum(module.energy for module in self.modules)


@record
class CodingRecord(Record):
    """What codes achieve: see `conversion.fidelity.coding`. bound, gap: None where A's initialisation tells more than spectra."""

    bits: int
    numbers: int
    bits_per_number: float
    widths: dict[str, int]
    widths_by_part: dict[str, dict[str, int]]
    bound: float | None
    least_error: float
    gap: float | None


@record
class InitialisationRecord(Record):
    """A's random initialisation. cosine: mean of A's with their draws; changed: share of A's energy that training put in.

    seed, offset: of the draws, and how many were before the adapter's own; file: of the library, where there is no seed.
    modules: whose draws were found; used: that are stored against them. bytes_without: forecast of what codes of the same error
    would take without it.
    """

    generator: str
    seed: int | None = None
    offset: int | None = None
    file: str | None = None
    modules: int
    cosine: float
    changed: float
    changed_by_module: dict[str, float]
    used: int | None = None
    bytes_without: int | None = None


@record
class BaselineRecord(Record):
    """Plain truncated SVD of the same size. unbiased_error: of the same with every module unbiased."""

    parameter_ratio: float
    relative_error: float
    unbiased_error: float


@record
class StepRecord(Record):
    """One size on the way to a behaviour, measured on the validation rows. bound: of all rows, with 95 % certainty."""

    bytes: int
    byte_ratio: float
    transform: str
    distilled: bool
    kl: float
    base_kl: float
    retention: float
    agreement: float
    bound: float
    met: bool
    kept: bool


@record
class ProofRecord(Record):
    """What a result does on the test rows, with 95 % intervals over rows. met: of a behaviour that was asked for."""

    rows: int
    kl: float
    base_kl: float
    retention: float
    agreement: float
    kl_ci95: list[float]
    retention_ci95: list[float]
    agreement_ci95: list[float]
    met: bool | None = None


@record
class AimRecord(Record):
    """What the result had to reach, every size that was tried for a behaviour, and what results did on the test rows."""

    asked: dict[str, Any]
    path: list[StepRecord]
    proofs: list[ProofRecord]


@record
class MetricRecord(Record):
    """The KL on the validation rows of a conversion in each metric, and the metric that was kept."""

    kl: dict[str, float]
    kept: str


@record
class EvidenceRecord(Record):
    """How many rows of the prompts were for what, the metric of the fit, and what the result does on the test rows."""

    rows: dict[str, int]
    metric: MetricRecord
    proof: ProofRecord


@record
class TrainingRecord(Record):
    """What a distillation did. heldout_kl: on the rows that choose the state kept. completions: that it had written."""

    steps: int
    kept_step: int
    heldout_kl_before: float
    heldout_kl_after: float
    heldout_rows: int
    training_rows: int
    tokens_per_second: float
    peak_bytes: int
    trained: str
    trained_parameters: int
    device: str
    processes: int
    dtype: str
    options: dict[str, Any]
    completions: dict[str, int] | None = None


@record
class SecondsRecord(Record):
    """Seconds by step; None where time is left out of a record."""

    read: float | None
    fit: float | None
    write: float | None
    total: float | None


@record
class Fidelity(Record):
    """`fidelity.json`: what `compress` and `finetune` return. functional: what `verify --save` found, None before."""

    schema_version: int
    tool_version: str
    source: SourceRecord
    recipe: dict[str, Any]
    compact: CompactRecord
    weight: WeightRecord
    coding: CodingRecord | None = None
    initialisation: InitialisationRecord | None = None
    baselines: dict[str, BaselineRecord]
    functional: Verification | None
    aim: AimRecord
    evidence: EvidenceRecord | None = None
    training: TrainingRecord | None = None
    deduplication: dict[str, int] | None = None
    notes: list[str]
    seconds: SecondsRecord
    files: Files | None = None


@record
class Inspection(Record):
    """What `inspect` returns. sizes: forecasts, of a LoRA. integrity: whether what is compact is what was written.

    stored_parameters: numbers of a file in the authors' layout, every copy counted.
    """

    kind: str
    convertible: bool
    reasons: list[str]
    base_model: str | None
    modules: int
    parameters: int
    bytes: int
    dtype: str | None = None
    bytes_by_part: dict[str, int]
    ranks: dict[str, int]
    expanded_rank: int
    slot_bytes: dict[str, int]
    transform: str | None = None
    shared_ranks: dict[str, int] | None = None
    kinds: list[dict[str, Any]] | None = None
    spectra: list[dict[str, Any]] | None = None
    sizes: list[dict[str, Any]] | None = None
    initialisation: InitialisationRecord | None = None
    integrity: str | None = None
    stored_parameters: int | None = None
    notes: list[str]


@record
class OriginalRecord(Record):
    """The LoRA that the compact adapter was made from, and how far off it is at most."""

    sha256: str | None
    relative_error: float


@record
class ServedRecord(Record):
    """What a server reserves: the rank that it is started with and the bytes of one slot, None where no slot holds the rank.

    target_modules: the kinds that it is told to make room for, so that a slot takes no more; None where it can't be told.
    options: what it has to be started with besides, so that it applies all of the adapter.
    """

    max_lora_rank: int | None
    slot_bytes: int | None
    target_modules: list[str] | None = None
    options: list[str] | None = None


@record
class Expanded(Record):
    """`expansion.json`: what `expand` returns. architecture: of a GGUF file. served: a server's slot, if any.

    drawn: seed and places of rows of A that are its draws, of an adapter that was trained from them.
    """

    schema_version: int
    tool_version: str
    source: dict[str, str]
    format: str
    engine: str | None
    modules: int
    ranks: dict[str, int]
    parameters: int
    bytes: int
    architecture: str | None = None
    served: ServedRecord | None
    relative_error: float
    original: OriginalRecord | None
    dtype: str
    base_model: str | None
    drawn: dict[str, Any] | None = None
    notes: list[str]
    files: Files | None = None
