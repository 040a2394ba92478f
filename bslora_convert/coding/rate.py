"""What no code can do better: the Gaussian rate–distortion bound for an adapter's spectra.

A component of energy σ² stands on n = out + in numbers. Taken as independent normal ones, R bits a number leave the share
D = 2^(−2R) of each side's variance at best, and the component loses σ² (1 − (1 − D)²). At a price λ a bit the best D solves

    d/dD [ σ² (1 − (1 − D)²) − λ n ½ log₂ D ] = 0        D (1 − D) = λ n / (4 ln 2 σ²) =: c        D = (1 − √(1 − 4c)) / 2

and components with c ≥ ¼, or that cost more than they save, are left out: reverse water-filling, R = Σ max(0, n ½ log₂ 1/D).
"""

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

BISECTIONS = 100


def bound(spectra: Mapping[str, Tensor], costs: Mapping[str, int], bits: float) -> float:
    """The least energy that `bits` bits can lose. spectra: σ² of each module; costs: out + in."""
    energies, numbers = _components(spectra, costs)
    if bits <= 0:
        return float(energies.sum())
    return _bisected(energies, numbers, lambda found: found[0] <= bits)[1]


def needed(spectra: Mapping[str, Tensor], costs: Mapping[str, int], lost: float) -> float:
    """The least bits that can lose the energy `lost` or less."""
    energies, numbers = _components(spectra, costs)
    return _bisected(energies, numbers, lambda found: found[1] >= lost)[0]


def _components(spectra: Mapping[str, Tensor], costs: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """σ² and out + in of every component that has energy."""
    energies = np.concatenate([values.double().cpu().numpy() for values in spectra.values()])
    numbers = np.concatenate([np.full(len(values), costs[name], dtype=float) for name, values in spectra.items()])
    return energies[energies > 0], numbers[energies > 0]


def _bisected(
    energies: np.ndarray, numbers: np.ndarray, dear: Callable[[tuple[float, float]], bool]
) -> tuple[float, float]:
    """(bits, energy lost) at the lowest price of which `dear` says that it is high enough."""
    if not len(energies):
        return 0.0, 0.0
    low, high = 1e-30 * energies.max(), energies.max()
    for _ in range(BISECTIONS):
        middle = np.sqrt(low * high)
        low, high = (low, middle) if dear(_at(energies, numbers, middle)) else (middle, high)
    return _at(energies, numbers, high)


def _at(energies: np.ndarray, numbers: np.ndarray, price: float) -> tuple[float, float]:
    """(bits, energy lost) at a price."""
    c = price * numbers / (4 * np.log(2) * energies)
    d = np.where(c < 0.25, (1 - np.sqrt(np.clip(1 - 4 * c, 0, None))) / 2, 1.0)
    d = np.clip(d, 1e-300, 1.0)
    rate = -0.5 * numbers * np.log2(d)
    lost = energies * (1 - (1 - d) ** 2)
    kept = lost + price * rate < energies
    return float(rate[kept].sum()), float(lost[kept].sum() + energies[~kept].sum())
