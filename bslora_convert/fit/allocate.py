"""From a budget to ranks: local components go where they buy most.

Module m with singular values σ₁ ≥ σ₂ ≥ … pays c_m = out + in numbers for one more rank and gains σ²_{k+1} of energy. Taking
components in the order of σ²/c until the budget is spent is the Lagrangian solution of

    min Σ_m Σ_{k > r_m} σ²_{m,k}    s.t.  Σ_m c_m r_m ≤ budget

exact for every budget that it spends in full, and off by less than one component otherwise; components that no
longer fit are passed over, so that a cheaper module uses the rest. The falling σ keep the ranks of a module nested.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

Ranks = dict[str, int]


def _order(
    spectra: Mapping[str, Tensor], costs: Mapping[str, int], first: Mapping[str, int]
) -> list[tuple[str, float]]:
    """Every component of positive energy beyond `first`, best energy per number first: (module, energy)."""
    names = list(spectra)
    owner, energy = [], []
    for position, name in enumerate(names):
        values = spectra[name].double().cpu().numpy()[first.get(name, 0) :]
        values = values[values > 0]
        owner.append(np.full(len(values), position))
        energy.append(values)
    if not owner:
        return []
    owners, energies = np.concatenate(owner), np.concatenate(energy)
    price = np.array([costs[name] for name in names], dtype=np.float64)[owners]
    best = np.argsort(-(energies / price), kind="stable")
    return [(names[owners[i]], float(energies[i])) for i in best]


def within_budget(
    spectra: Mapping[str, Tensor], costs: Mapping[str, int], budget: int, first: Mapping[str, int] | None = None
) -> Ranks:
    """Ranks of lowest lost energy that cost at most `budget` numbers.

    spectra: σ² of each module, falling. costs: numbers that one rank of a module takes.
    first: components of each module that are paid for elsewhere and passed over.
    """
    first = first or {}
    ranks = dict.fromkeys(spectra, 0)
    full: set[str] = set()
    for name, _ in _order(spectra, costs, first):
        if name in full:
            continue
        if costs[name] > budget:
            full.add(name)
            continue
        ranks[name] += 1
        budget -= costs[name]
    return ranks


def within_energy(
    spectra: Mapping[str, Tensor], costs: Mapping[str, int], lost: float, first: Mapping[str, int] | None = None
) -> Ranks:
    """Cheapest ranks that lose at most the energy `lost`, found by the same order."""
    first = first or {}
    ranks = dict.fromkeys(spectra, 0)
    remaining = sum(float(values[first.get(name, 0) :].sum()) for name, values in spectra.items())
    for name, energy in _order(spectra, costs, first):
        if remaining <= lost:
            break
        ranks[name] += 1
        remaining -= energy
    return ranks


def uniform(limits: Mapping[str, int], costs: Mapping[str, int], budget: int) -> Ranks:
    """The largest single rank for all modules that costs at most `budget`, cut to each module's own limit."""
    rank = 0
    while rank < max(limits.values(), default=0):
        cost = sum(min(rank + 1, limits[name]) * costs[name] for name in limits)
        if cost > budget:
            break
        rank += 1
    return {name: min(rank, limit) for name, limit in limits.items()}


def lost_energy(
    spectra: Mapping[str, Tensor], ranks: Mapping[str, int], first: Mapping[str, int] | None = None
) -> float:
    """Σ of the energies left out by these ranks."""
    first = first or {}
    return sum(float(values[ranks[name] + first.get(name, 0) :].sum()) for name, values in spectra.items())


def cost_of(ranks: Mapping[str, int], costs: Mapping[str, int]) -> int:
    """Numbers that these ranks store."""
    return sum(rank * costs[name] for name, rank in ranks.items())
