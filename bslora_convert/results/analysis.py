"""Records of what modules have in common, and of every form at one size."""

from typing import Any

from bslora_convert.results.record import Files, Record, record


@record
class Analysis(Record):
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
    activations: dict[str, Any] | None = None
    sizes: list[dict[str, Any]]
    recommendation: list[str]
    files: Files | None = None


@record
class FormBehaviour(Record):
    """What a form does on prompts."""

    kl: float
    base_kl: float
    retention: float
    agreement: float
    nll: float
    nll_reference: float
    rows: int


@record
class FormRow(Record):
    """One form at one size; numbers are None where it has no fit, and the note says why."""

    form: str
    budget: float
    parameters: int | None
    parameter_ratio: float | None
    bytes: int | None
    byte_ratio: float | None
    relative_error: float | None
    gain: float | None
    seconds: float
    note: str
    settings: dict[str, Any]
    functional: FormBehaviour | None

    @property
    def kl(self) -> float | None:
        """The KL to the original; None where it was not measured."""
        return self.functional.kl if self.functional is not None else None


@record
class Comparison(Record):
    """`comparison.json`: what `compare` returns, a row for every form and size."""

    schema_version: int
    tool_version: str
    source: dict[str, Any]
    dtype: str
    rows: list[FormRow]
    files: Files | None = None

    @property
    def has_behaviour(self) -> bool:
        """Whether a form was measured on prompts."""
        return any(row.functional for row in self.rows)
