"""Ranks of the truncated SVD whose codes fit in so many bytes, and how many rows of Δ = A − T A₀ are coded where A₀ is known.

for_all     one rank k for all modules, and one d for Δ: of all pairs of which k is the largest that fits beside d, that of least

                Σ_m Σ_{i > k} σ²_i + Σ_{d < i ≤ k} ‖b_i δ_i‖² + (κ − 1) Σ_{i > d} ‖b_i δ_i‖²

by_energy   over all modules: a component's column of B and row of T buy σ²_i − ‖b_i δ_i‖², its row of Δ κ ‖b_i δ_i‖², and what
            buys most a number is taken first

Without an initialisation a component is bought as a whole.
"""

from collections.abc import Mapping

from bslora_convert.baselines.baseline import OutOfReach, largest
from bslora_convert.baselines.blocks import Grid
from bslora_convert.baselines.initialised import PLAIN, Known, Rows
from bslora_convert.coding.items import KAPPA
from bslora_convert.fit import allocate
from bslora_convert.fit.allocate import Ranks
from bslora_convert.fit.source import Source

Planned = tuple[Ranks, Rows]
REST = " Δ"  # ends the name of what a module's Δ is allocated under


def bytes_of(grid: Grid, source: Source, ranks: Mapping[str, int], rows: Rows = PLAIN) -> int:
    """Bytes of the codes of these ranks, and of T."""
    shapes = source.shapes
    return sum(
        grid.bytes(rank, shapes[name][0])
        + grid.bytes(rows.coded(name, rank), shapes[name][1])
        + rank * rows.beside(name)
        for name, rank in ranks.items()
    )


def for_all(grid: Grid, source: Source, known: Known, budget: int, form: str) -> Planned:
    """One rank for all modules, cut to what each has. budget: in bytes. form: its name.

    :raises OutOfReach: when rank 1 is more than the budget.
    """
    most = max(map(len, source.spectra.values()))
    planned: list[Planned] = []
    for first in range(most + 1 if known.bases else 1):
        rows = Rows(known, dict.fromkeys(known.bases, first))

        def ranks(size: int, first: int = first) -> Ranks:
            return {name: min(max(size, first), len(energies)) for name, energies in source.spectra.items()}

        try:
            size = largest(
                lambda size, ranks=ranks, rows=rows: bytes_of(grid, source, ranks(size), rows),  # type: ignore[misc]
                budget, most, form, "bytes",
            )  # fmt: skip
        except OutOfReach:
            if not first:
                raise
            break
        planned.append((ranks(size), rows))
    return min(planned, key=lambda plan: _expected(source, *plan))


def _expected(source: Source, ranks: Ranks, rows: Rows) -> float:
    """What is left out (module docstring)."""
    total = 0.0
    for name, energies in source.spectra.items():
        rank = ranks[name]
        total += float(energies[rank:].sum()) - rows.known.left_out(name, rank)
        total += KAPPA * rows.known.left_out(name, rows.coded(name, rank))
    return total


def by_energy(grid: Grid, source: Source, known: Known, budget: int, form: str) -> Planned:
    """Ranks by energy per number over all modules. budget: in bytes. form: its name.

    :raises OutOfReach: when not even the cheapest component fits.
    """
    spectra, costs = dict(source.spectra), dict(source.costs)
    for name, changed in known.changed.items():
        out, width = source.shapes[name]
        spectra[name], costs[name] = spectra[name] - changed, out - (-8 * Rows(known).beside(name) // grid.bits)
        spectra[f"{name}{REST}"], costs[f"{name}{REST}"] = KAPPA * changed, width
    least = min(costs[name] for name in source.deltas)

    def planned(numbers: int) -> Planned:
        found = allocate.within_budget(spectra, costs, max(numbers, least))
        return {name: found[name] for name in source.deltas}, Rows(
            known, {name: min(found[f"{name}{REST}"], found[name]) for name in known.bases}
        )

    def size(numbers: int) -> int:
        ranks, rows = planned(numbers)
        return bytes_of(grid, source, ranks, rows)

    limit = sum(len(values) * costs[name] for name, values in spectra.items()) if known.bases else source.parameters
    return planned(largest(size, budget, limit, form, "bytes"))
