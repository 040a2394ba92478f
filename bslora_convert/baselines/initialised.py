"""What a quantiser can make of A's random initialisation A₀, which costs a file nothing as a seed makes it again.

    B A ≈ B̂ (T̂ A₀ + Δ̂)        bytes of k components: codes of B (k, out), 2 k r₀ for T, codes of the first d rows of Δ (d, in)

Codes are the quantiser's own; how many rows of Δ have them is chosen with its ranks. Of several ways to spend the bytes, A
without A₀ among them, that of least

    Σ ‖ΔW − ΔŴ‖² + (κ − 1) Σ ‖what is left out of B Δ‖²

is taken. κ is that of our own codes (`coding.items`): the module answers to what training changed more than its size says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from bslora_convert.baselines.baseline import Fitted, OutOfReach
from bslora_convert.baselines.blocks import SCALES
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
class Known:
    """Of the modules where A₀ is known: bases A₀ (r₀, in); changed: ‖b_i δ_i‖² of every component b_i (t_i A₀ + δ_i)."""

    bases: Mapping[str, Tensor] = field(default_factory=dict)
    changed: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source) -> "Known":
        """That of a source.

        :raises OutOfReach: where A₀ is known of no module.
        """
        initial, bases = source.initial, dict[str, Tensor]()
        for name, delta in source.deltas.items():
            base = None if initial is None else initial.base(name)
            if base is not None:
                bases[name] = base.to(delta.stored.a.device)
        if not bases:
            raise OutOfReach("needs A's random initialisation, which is not known")

        def changed(name: str) -> Tensor:
            energies = source.svds[name].energies
            rows = source.svds[name].truncate([source.deltas[name].factors()], len(energies)).a
            rest = rows - Mix.of(rows, bases[name]).decode()
            share = rest.double().square().sum(1) / rows.double().square().sum(1).clamp_min(SMALLEST_NORM)
            return energies * share.to(energies).clamp(0, 1)

        return cls(bases, dict(zip(bases, each(changed, bases), strict=True)))

    def left_out(self, name: str, first: int) -> float:
        """‖b_i δ_i‖² of a module's components from `first` on; 0 where A₀ is not known."""
        return float(self.changed[name][first:].sum()) if name in self.changed else 0.0


NOTHING = Known()


@dataclass(frozen=True, slots=True)
class Rows:
    """How rows of A are stored.

    known: A₀ of the modules that are stored against it. rest: how many rows of Δ, the first, have codes there.
    """

    known: Known = NOTHING
    rest: Mapping[str, int] = field(default_factory=dict)

    def mix(self, name: str, rows: Tensor) -> Mix | None:
        """What rows (k, in) of a module take of A₀; None where they are stored without it."""
        return Mix.of(rows, self.known.bases[name]) if name in self.known.bases else None

    def coded(self, name: str, count: int) -> int:
        """How many of the first `count` rows have codes."""
        return min(self.rest.get(name, 0), count) if name in self.known.bases else count

    def beside(self, name: str) -> int:
        """Bytes of one row of T."""
        return SCALES.itemsize * len(self.known.bases[name]) if name in self.known.bases else 0

    @property
    def settings(self) -> Mapping[str, object]:
        """What a reader is told of it."""
        if not self.known.bases:
            return {}
        least, most = min(self.rest.values(), default=0), max(self.rest.values(), default=0)
        return {"rank of A - T A0": most if least == most else f"{least} to {most}"}


PLAIN = Rows()


def against(initial: Initial) -> str:
    """What a reader is told of a form that uses it."""
    key = initial.key
    return f"against A's initialisation, {key if isinstance(key, str) else f'seed {key}'}"


def note_of(source: Source, rows: Rows) -> str:
    """The same of a way to store rows of A."""
    return "" if source.initial is None or not rows.known.bases else against(source.initial)


def lost(source: Source, fitted: Fitted, rows: Rows, known: Known) -> float:
    """What a fit loses, what it leaves out of B Δ counted κ times (module docstring)."""

    def of(name: str) -> float:
        made = fitted.deltas[name]
        error = residual_energy(source.deltas[name].factors(), source.grams[name], made)
        return error + (KAPPA - 1) * known.left_out(name, rows.coded(name, made.rank))

    return sum(each(of, source.deltas))


def best_of(
    among: Sequence[Choice], fit: Callable[[Choice], Fitted], lost: Callable[[Choice, Fitted], float]
) -> Choice:
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
