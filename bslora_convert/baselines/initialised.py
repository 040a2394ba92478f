"""What a quantiser can make of A's random initialisation A₀, which costs a file nothing as a seed makes it again.

    B A ≈ B̂ (T̂ A₀ + Δ̂)        bytes of k components: codes of B (k, out), 2 k r₀ for T, codes of Δ (k, in)

Three ways for all modules of an adapter: A without A₀, with Δ in the quantiser's own codes, with Δ left out. The one of least

    Σ ‖ΔW − ΔŴ‖² + (κ − 1) Σ ‖what is left out of B Δ‖²

is taken. κ is that of our own codes (`coding.items`): the module answers to what training changed more than its size says.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from bslora_convert.baselines.baseline import Fitted, OutOfReach
from bslora_convert.baselines.blocks import SCALES, Grid
from bslora_convert.baselines.coded import Mix
from bslora_convert.coding.items import KAPPA
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.lowrank import residual_energy

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


def ways(source: Source, initial: bool) -> Sequence[Rows]:
    """Those that a form may take. initial: whether it knows A₀.

    :raises OutOfReach: where A₀ is known of no module and has to be.
    """
    if not initial:
        return (PLAIN,)
    bases = bases_of(source)
    return PLAIN, Rows(bases), Rows(bases, rest=False)


def note_of(source: Source, rows: Rows) -> str:
    """What a row of the comparison says of it."""
    return f"against A's initialisation, seed {source.initial.seed}" if source.initial and rows.bases else ""


def lost(source: Source, fitted: Fitted, rows: Rows, bases: Mapping[str, Tensor]) -> float:
    """What a fit loses, what it leaves out of B Δ counted κ times (module docstring). bases: all that are known."""

    def of(name: str) -> float:
        found, made = source.deltas[name].factors(), fitted.deltas[name]
        error = residual_energy(found, source.grams[name], made)
        if name not in bases:
            return error
        energies = source.svds[name].energies
        vectors = source.svds[name].truncate([found], len(energies)).a
        change = vectors - Mix.of(vectors, bases[name]).decode()
        share = change.double().square().sum(1) / vectors.double().square().sum(1).clamp_min(1e-300)
        stored = made.rank if rows.has_codes(name) else 0
        return error + (KAPPA - 1) * float((energies * share.to(energies))[stored:].sum())

    return sum(each(of, source.deltas))


def best_of(source: Source, among: Sequence[Rows], fit: Callable[[Rows], Fitted]) -> Fitted:
    """Of the ways that fit the one that loses least.

    :raises OutOfReach: as the fit does, when none fits.
    """
    if len(among) == 1:
        return fit(among[0])
    bases = {name: base for rows in among for name, base in rows.bases.items()}
    tried: list[tuple[float, int, Fitted]] = []
    refused: OutOfReach | None = None
    for place, rows in enumerate(among):
        try:
            found = fit(rows)
        except OutOfReach as reason:
            refused = reason  # the last way takes least
            continue
        tried.append((lost(source, found, rows, bases), place, found))
    if not tried:
        assert refused is not None  # each way fitted or was refused
        raise refused
    return min(tried, key=lambda one: one[:2])[2]
