"""A byte budget spent on rank and precision together.

An item is what can be coded on its own: a component of a module's local part (a width for each of its sides, or none: the
component is left out), or a vector of a shared part (a width). Option o of item i takes bits b_io and counts as the loss d_io:

    min Σ d_i,o(i)   s.t.   Σ b_i,o(i) ≤ budget             Lagrangian:  o(i) = argmin_o d_io + λ b_io

Whatever λ is, o(i) is a corner of the lower convex hull of item i's points (b, d). From corner to corner d falls by ever less a
bit, so that all items' steps, taken in the order of what they gain a bit, go through the choices of every λ from ∞ to 0: a budget
or a wanted loss ends them. What is left of a budget then goes to later steps that fit.

d of a local component is in `items`; of a shared vector it is D times the energy of its component over all modules that use it,
which is why shared vectors end up in more bits than local ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np


@dataclass(frozen=True, slots=True)
class Items:
    """bits, lost: (items, options); lost is inf where an option does not exist.

    lost: what an option counts as when one is chosen. energy: what it loses, where that is not the same.
    """

    bits: np.ndarray
    lost: np.ndarray
    energy: np.ndarray | None = None

    def hull(self) -> "Hull":
        """The corners of every item, cheapest first."""
        worth = self._worth_taking()
        if worth is not None:
            energy = None if self.energy is None else self.energy[:, worth]
            found = Items(self.bits[:, worth], self.lost[:, worth], energy)._corners()
            return replace(found, options=worth[found.options])
        return self._corners()

    def _worth_taking(self) -> np.ndarray | None:
        """Options that lose less than every cheaper one, for some item; None where items take different bits."""
        if not len(self.bits) or self.bits.strides[0]:
            return None
        order = np.argsort(self.bits[0], kind="stable")
        lost = self.lost[:, order]
        least = np.minimum.accumulate(lost, 1)
        better = np.append(True, (lost[:, 1:] < least[:, :-1]).any(0))
        return np.sort(order[better])

    def _corners(self) -> "Hull":
        rows = np.arange(len(self.bits))
        exists = np.isfinite(self.lost)
        cheapest = np.where(exists, self.bits, np.inf).min(1, keepdims=True)
        at = np.argmin(np.where(exists & (self.bits == cheapest), self.lost, np.inf), 1)
        corners = [at]
        while True:
            more = self.bits - self.bits[rows, at][:, None]
            less = self.lost[rows, at][:, None] - self.lost
            rate = np.where((more > 0) & (less > 0), less, 0.0) / np.where(more > 0, more, 1.0)
            best = rate.max(1, initial=0.0, keepdims=True)
            # Of equal gains a bit the farthest step: those between are no corners.
            following = np.argmax(np.where((rate == best) & (best > 0), self.bits, -1.0), 1)
            at = np.where(best[:, 0] > 0, following, at)
            if (at == corners[-1]).all():
                break
            corners.append(at)
        options = np.stack(corners, 1)
        energy = self.lost if self.energy is None else self.energy

        def held(values: np.ndarray) -> np.ndarray:
            found: np.ndarray = np.take_along_axis(values, options, 1)
            return found

        return Hull(options, held(self.bits), held(self.lost), held(energy))


@dataclass(frozen=True)
class Hull:
    """Corners of items, (items, corners) each, cheapest first; the last of an item is repeated.

    options: of `Items`. bits, lost, energy: as there. A choice is a corner of each item, (items,).
    """

    options: np.ndarray
    bits: np.ndarray
    lost: np.ndarray
    energy: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence["Hull"]) -> "Hull":
        """All of them as one."""
        longest = max(part.options.shape[1] for part in parts)

        def filled(arrays: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([np.pad(a, ((0, 0), (0, longest - a.shape[1])), mode="edge") for a in arrays])

        names = ("options", "bits", "lost", "energy")
        return cls(*(filled([getattr(part, name) for part in parts]) for name in names))

    def bits_at(self, chosen: np.ndarray) -> int:
        """Bits of a choice."""
        return int(self._at(self.bits, chosen).sum())

    def energies_at(self, chosen: np.ndarray) -> np.ndarray:
        """What it loses, by item."""
        return self._at(self.energy, chosen)

    def options_at(self, chosen: np.ndarray) -> np.ndarray:
        """Its options, by item."""
        return self._at(self.options, chosen)

    @property
    def cheapest(self) -> np.ndarray:
        """The choice of fewest bits."""
        return np.zeros(len(self.bits), int)

    @property
    def finest(self) -> np.ndarray:
        """The choice of least loss."""
        return np.full(len(self.bits), self.bits.shape[1] - 1)

    def within_bits(self, budget: int) -> np.ndarray | None:
        """The choice of least loss that takes at most `budget` bits; None where even the cheapest takes more."""
        rest = budget - self.bits_at(self.cheapest)
        if rest < 0:
            return None
        items, bits, _ = self._steps
        count = int(np.searchsorted(bits.cumsum(), rest, "right"))
        chosen, rest = self._after(count), rest - int(bits[:count].sum())
        ended: set[int] = set()  # items whose next step did not fit
        least = np.minimum.accumulate(bits[::-1])[::-1]  # bits of any step from here on
        for step in range(count, len(items)):
            if least[step] > rest:
                break
            item = int(items[step])
            if bits[step] > rest or item in ended:
                ended.add(item)
                continue
            chosen[item] += 1
            rest -= int(bits[step])
        return chosen

    def about_bits(self, budget: int) -> np.ndarray:
        """The choice of one λ that takes at most `budget` bits, or the cheapest."""
        _, bits, _ = self._steps
        return self._after(int(np.searchsorted(bits.cumsum(), budget - self.bits_at(self.cheapest), "right")))

    def within_loss(self, allowed: float) -> np.ndarray:
        """The choice of fewest bits that loses at most the energy `allowed`; that of least loss where none does."""
        _, _, saved = self._steps
        lost = self.energies_at(self.cheapest).sum() - np.append(0.0, saved.cumsum())
        return self._after(int(np.argmax(lost <= allowed)) if (lost <= allowed).any() else len(saved))

    def _after(self, count: int) -> np.ndarray:
        """The choice after so many steps."""
        return np.bincount(self._steps[0][:count], minlength=len(self.bits))

    @cached_property
    def _steps(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Every step from a corner to the next: its item, its bits, the energy that it saves; what gains most a bit first."""
        bits, gain, saved = np.diff(self.bits, axis=1), -np.diff(self.lost, axis=1), -np.diff(self.energy, axis=1)
        item, _ = taken = np.nonzero(bits > 0)
        order = np.argsort(-gain[taken] / bits[taken], kind="stable")
        return item[order], bits[taken][order], saved[taken][order]

    @staticmethod
    def _at(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        found: np.ndarray = values[np.arange(len(values)), np.minimum(chosen, values.shape[1] - 1)]
        return found
