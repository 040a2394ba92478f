"""What a size would cost, from the spectra alone: no vector is coded.

A component of energy σ² of a module (out, in), its two sides in widths u and v, takes the bits that codes take and loses

    σ² (1 − (1 − D_u)(1 − D_v))           D_w: the share that w bits a number lose of a normal vector

so that the allocation of `allocation` can be made without the vectors. Refits gain a little on it; what is written says how much.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from bslora_convert.bslora.coding.coded import bits_of
from bslora_convert.bslora.coding.widths import WIDTHS
from bslora_convert.coding.allocation import Items, least_loss, within_loss
from bslora_convert.coding.encode import lost_shares
from bslora_convert.modules.factors import Shape

VECTORS, LENGTH = 32, 2048  # normal ones that the shares are taken of


@dataclass(frozen=True, slots=True)
class Forecast:
    """The options of every component of some spectra; None where there is no energy."""

    items: Items | None

    @classmethod
    def of(cls, spectra: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> "Forecast":
        """spectra: σ² of each module, falling. shapes: (out, in)."""
        return cls(_items(spectra, shapes))

    def bits_for(self, lost: float) -> int:
        """Bits of codes that lose about this energy."""
        return self.items.bits_at(within_loss(self.items, lost)) if self.items is not None else 0

    def lost_for(self, bits: int) -> float:
        """The energy that about so many bits of codes lose."""
        return self.items.lost_at(least_loss(self.items, bits)) if self.items is not None else 0.0


def _items(spectra: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> Items | None:
    """One for each component that has energy: left out, or its two sides in two widths."""
    shares = np.array(_shares())
    kept = np.outer(1 - shares, 1 - shares).ravel()  # of the energy, by the two widths
    bits, lost = [], []
    for name, values in spectra.items():
        energies = values[values > 0].double().cpu().numpy()
        out, width = shapes[name]
        cost = [0, *(bits_of(out, u) + bits_of(width, v) for u, v in product(WIDTHS, repeat=2))]
        bits.append(np.tile(np.array(cost, dtype=float), (len(energies), 1)))
        lost.append(np.column_stack([energies, np.outer(energies, 1 - kept)]))
    return Items(np.concatenate(bits), np.concatenate(lost)) if sum(map(len, bits)) else None


@cache
def _shares() -> tuple[float, ...]:
    """D of each width of WIDTHS for normal vectors."""
    vectors = torch.randn(VECTORS, LENGTH, generator=torch.Generator().manual_seed(0))
    return tuple(lost_shares(vectors).mean(0).tolist())
