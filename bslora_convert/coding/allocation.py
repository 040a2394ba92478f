"""A byte budget spent on rank and precision together.

An item is what can be coded on its own: a component of a module's local part (a width for each of its two sides, or none: the
component is left out), or a vector of a shared part (a width). Option o of item i takes bits b_io and loses the energy d_io:

    min Σ d_i,o(i)   s.t.   Σ b_i,o(i) ≤ budget             Lagrangian:  o(i) = argmin_o d_io + λ b_io

λ is bisected; what is left of the budget then goes, step by step, to the upgrade that fits and gains most a bit. With λ → 0 the
loss is the least that the widths allow, and a wanted loss instead of a budget is bisected in the same way.

d of a local component is σ² (1 − (1 − D_u)(1 − D_v)) (`encode`); of a shared vector D times the energy of its component over
all modules that use it, which is why shared vectors end up in more bits than local ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

BISECTIONS = 200
UPGRADES = 10_000


@dataclass(frozen=True, slots=True)
class Items:
    """bits, lost: (items, options), option 0 the cheapest; inf where an option does not exist.

    lost: what an option counts as when one is chosen. energy: what it loses, where that is not the same.
    """

    bits: np.ndarray
    lost: np.ndarray
    energy: np.ndarray | None = None

    def at(self, price: float) -> np.ndarray:
        """The best option of every item at a price a bit; of equal ones the cheaper."""
        cost = self.lost + price * np.where(np.isfinite(self.lost), self.bits, 0)
        best: np.ndarray = np.argmin(cost, axis=1)
        return best

    def bits_at(self, chosen: np.ndarray) -> int:
        """Bits of a choice."""
        return int(self.bits[np.arange(len(chosen)), chosen].sum())

    def lost_at(self, chosen: np.ndarray) -> float:
        """Energy that a choice loses."""
        return float(self.energies_at(chosen).sum())

    def energies_at(self, chosen: np.ndarray) -> np.ndarray:
        """The same by item."""
        found: np.ndarray = (self.lost if self.energy is None else self.energy)[np.arange(len(chosen)), chosen]
        return found


def joined(parts: Sequence[Items]) -> Items:
    """All of them as one, options that some don't have at infinity."""
    columns = max(part.bits.shape[1] for part in parts)

    def filled(arrays: list[np.ndarray]) -> np.ndarray:
        wide = [np.pad(a, ((0, 0), (0, columns - a.shape[1])), constant_values=np.inf) for a in arrays]
        return np.concatenate(wide)

    energies = [part.lost if part.energy is None else part.energy for part in parts]
    return Items(filled([part.bits for part in parts]), filled([part.lost for part in parts]), filled(energies))


def within_bits(items: Items, budget: int) -> np.ndarray | None:
    """Options of least loss that take at most `budget` bits; None where even the cheapest take more."""
    cheapest = np.argmin(np.where(np.isfinite(items.lost), items.bits, np.inf), axis=1)
    if items.bits_at(cheapest) > budget:
        return None
    best = items.at(0.0)
    if items.bits_at(best) <= budget:
        return best
    _, above = _around(items, lambda chosen: items.bits_at(chosen) > budget)
    return _filled(items, above, budget)


def least_loss(items: Items, budget: int) -> np.ndarray:
    """Options of about the least loss within `budget` bits: those of one price for all, what is left over not spent."""
    best = items.at(0.0)
    return best if items.bits_at(best) <= budget else _around(items, lambda chosen: items.bits_at(chosen) > budget)[1]


def within_loss(items: Items, allowed: float) -> np.ndarray:
    """The fewest bits that lose at most `allowed`; the most precise options where none does."""
    return _around(items, lambda chosen: items.lost_at(chosen) <= allowed)[0]


def _around(items: Items, rise: Callable[[np.ndarray], bool]) -> tuple[np.ndarray, np.ndarray]:
    """The options just below and just above the price up to which `rise` says of them to go on."""
    finite = np.where(np.isfinite(items.lost), items.lost, 0.0)
    low, high = 0.0, float(finite.max(initial=0.0) * 2 + 1e-300)  # a bit is dearer there than all that it could save
    below, above = items.at(low), items.at(high)
    for _ in range(BISECTIONS):
        middle = np.sqrt(low * high) if low else high / 2**20
        if not low < middle < high:
            break
        chosen = items.at(middle)
        if rise(chosen):
            low, below = middle, chosen
        else:
            high, above = middle, chosen
    return below, above


def _filled(items: Items, chosen: np.ndarray, budget: int) -> np.ndarray:
    """The choice with upgrades, the most gain a bit first, while one fits."""
    chosen = chosen.copy()
    rest = budget - items.bits_at(chosen)
    rows = np.arange(len(chosen))
    for _ in range(UPGRADES):
        more = items.bits - items.bits[rows, chosen][:, None]
        gain = np.maximum(items.lost[rows, chosen][:, None] - items.lost, 0.0)
        rate = np.where((more > 0) & (more <= rest), gain, 0.0) / np.maximum(np.where(np.isfinite(more), more, 1), 1)
        at = int(np.argmax(rate))
        item, option = divmod(at, rate.shape[1])
        if rate[item, option] <= 0:
            break
        rest -= int(more[item, option])
        chosen[item] = option
    return chosen
