"""What a quantiser can make of A's random initialisation A₀, which costs a file nothing as a seed makes it again.

    B A ≈ B̂ (T̂ A₀ + Δ̂)        bytes of k components: codes of B (k, out), 2 k r₀ for T, codes of Δ (k, in)

Three ways for all modules of an adapter: A without A₀, with Δ in the quantiser's own codes, with Δ left out. The one of least

    Σ ‖ΔW − ΔŴ‖² + (κ − 1) Σ ‖what is left out of B Δ‖²

is taken. κ is that of our own codes (`coding.items`): the module answers to what training changed more than its size says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from bslora_convert.baselines.baseline import Fitted, OutOfReach
from bslora_convert.baselines.blocks import SCALES, Grid
from bslora_convert.baselines.coded import Mix
from bslora_convert.coding.encode import SMALLEST_NORM
from bslora_convert.coding.items import KAPPA
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.initialisation.initial import Initial
from bslora_convert.modules.lowrank import residual_energy

Choice = TypeVar("Choice")

INITIAL = "_initial"  # ends the names of forms that know A₀


@dataclass(frozen=True, slots=True)
class Rows:
    """How rows of A are stored. bases: A₀ (r₀, in) of the modules that are stored against it. rest: whether Δ is stored there."""

    bases: Mapping[str, Tensor] = field(default_factory=dict)
    rest: bool = True

    def mix(self, name: str, rows: Tensor) -> Mix | None:
        """What rows (k, in) of a module take of A₀; None where they are stored without it."""
        return Mix.of(rows, self.bases[name]) if name in self.bases else None

    def has_codes(self, name: str) -> bool:
        """Whether a module's rows have codes."""
        return self.rest or name not in self.bases

    def bytes(self, grid: Grid, name: str, count: int, width: int) -> int:
        """What so many rows of a module take."""
        return (grid.bytes(count, width) if self.has_codes(name) else 0) + count * self.beside(name)

    def beside(self, name: str) -> int:
        """Bytes of one row of T."""
        return SCALES.itemsize * len(self.bases[name]) if name in self.bases else 0

    @property
    def settings(self) -> Mapping[str, str]:
        """What a reader is told of it."""
        return {"A": "T A0 + codes" if self.rest else "T A0"} if self.bases else {}


PLAIN = Rows()


def bases_of(source: Source) -> dict[str, Tensor]:
    """A₀ of every module where it is known.

    :raises OutOfReach: where that is none.
    """
    found: dict[str, Tensor] = {}
    for name, delta in source.deltas.items():
        base = None if source.initial is None else source.initial.base(name)
        if base is not None:
            found[name] = base.to(delta.stored.a.device)
    if not found:
        raise OutOfReach("needs A's random initialisation, which is not known")
    return found


def ways(known: Mapping[str, Tensor]) -> Sequence[Rows]:
    """Those that a form may take. known: A₀ where it is known, nothing for a form that does without; what takes least is first."""
    return (Rows(known, rest=False), PLAIN, Rows(known)) if known else (PLAIN,)


def seeded(initial: Initial) -> str:
    """What a reader is told of a form that uses it."""
    return f"against A's initialisation, seed {initial.seed}"


def note_of(source: Source, rows: Rows) -> str:
    """The same of a way to store rows of A."""
    return "" if source.initial is None or not rows.bases else seeded(source.initial)


def lost(source: Source, fitted: Fitted, rows: Rows, known: Mapping[str, Tensor]) -> float:
    """What a fit loses, what it leaves out of B Δ counted κ times (module docstring). known: A₀ where it is known."""

    def of(name: str) -> float:
        found, made = source.deltas[name].factors(), fitted.deltas[name]
        error = residual_energy(found, source.grams[name], made)
        if name not in known:
            return error
        energies = source.svds[name].energies
        vectors = source.svds[name].truncate([found], len(energies)).a
        change = vectors - Mix.of(vectors, known[name]).decode()
        share = change.double().square().sum(1) / vectors.double().square().sum(1).clamp_min(SMALLEST_NORM)
        stored = made.rank if rows.has_codes(name) else 0
        return error + (KAPPA - 1) * float((energies * share.to(energies))[stored:].sum())

    return sum(each(of, source.deltas))


def best_of(among: Sequence[Choice], fit: Callable[[Choice], Fitted], lost: Callable[[Choice, Fitted], float]) -> Choice:
    """The choice whose fit loses least of those that can be fitted.

    :raises OutOfReach: as the first of them does, when none can.
    """
    tried: list[tuple[float, int]] = []
    refused: OutOfReach | None = None
    for place, choice in enumerate(among):
        try:
            tried.append((lost(choice, fit(choice)), place))
        except OutOfReach as reason:
            refused = refused or reason
    if not tried:
        assert refused is not None  # each was fitted or refused
        raise refused
    return among[min(tried)[1]]
