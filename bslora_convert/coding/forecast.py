"""What a size would cost, from the spectra alone: no vector is coded.

A component of energy σ² of a module (out, in), its two sides in widths u and v, takes the bits that codes take and loses

    σ² (1 − (1 − D_u)(1 − D_v))           D_w: the share that w bits a number lose of a normal vector

so that the allocation of `allocation` can be made without the vectors. Refits gain a little on it; what is written says how much.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np
from torch import Tensor

from bslora_convert.bslora.codes.coded import bits_of
from bslora_convert.bslora.codes.widths import WIDTHS
from bslora_convert.coding.allocation import Items, least_loss, within_loss
from bslora_convert.coding.encode import distortions
from bslora_convert.fit.gain import Strength
from bslora_convert.modules.factors import Shape


@dataclass(frozen=True, slots=True)
class Forecast:
    """The options of every component of some spectra; None where there is no energy. owners: the module of each, by number."""

    items: Items | None
    owners: np.ndarray

    @classmethod
    def of(cls, spectra: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> "Forecast":
        """spectra: σ² of each module, falling. shapes: (out, in)."""
        counts = [int((values > 0).sum()) for values in spectra.values()]
        return cls(_items(spectra, shapes), np.repeat(np.arange(len(counts)), counts))

    def bits_for(self, lost: float) -> int:
        """Bits of codes that lose about this energy."""
        return self.items.bits_at(within_loss(self.items, lost)) if self.items is not None else 0

    def lost_for(self, bits: int) -> float:
        """The energy that about so many bits of codes lose, every module then made unbiased (`fit.gain`)."""
        if self.items is None:
            return 0.0
        chosen = least_loss(self.items, bits)
        energies = np.bincount(self.owners, self.items.lost[:, 0])  # of a component that is left out, all of it
        kept = energies - np.bincount(self.owners, self.items.lost[np.arange(len(chosen)), chosen])
        return float(sum(Strength(*pair).lost for pair in zip(energies, kept, strict=True)))


def _items(spectra: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> Items | None:
    """One for each component that has energy: left out, or its two sides in two widths."""
    bits, lost = [], []
    for name, values in spectra.items():
        energies = values[values > 0].double().cpu().numpy()
        out, width = shapes[name]
        kept = np.outer(1 - distortions(out).numpy(), 1 - distortions(width).numpy()).ravel()  # by the two widths
        cost = [0, *(bits_of(out, u) + bits_of(width, v) for u, v in product(WIDTHS, repeat=2))]
        bits.append(np.tile(np.array(cost, dtype=float), (len(energies), 1)))
        lost.append(np.column_stack([energies, np.outer(energies, 1 - kept)]))
    return Items(np.concatenate(bits), np.concatenate(lost)) if sum(map(len, bits)) else None
