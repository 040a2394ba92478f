"""What a size would cost, from the spectra alone: no vector is coded.

Every component takes the bits that its codes take and loses what their widths promise (`items`), so that the allocation of
`allocation` can be made without the vectors. Refits gain a little on it; what is written says how much.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bslora_convert.coding.allocation import Hull
from bslora_convert.coding.items import Against, component_items
from bslora_convert.fit.gain import Strength
from bslora_convert.modules.factors import Shape

Sides = tuple[Against | None, Against | None]


@dataclass(frozen=True, slots=True)
class Forecast:
    """The options of every component of some spectra; None where there is no energy. owners: the module of each, by number."""

    hull: Hull | None
    owners: np.ndarray

    @classmethod
    def of(
        cls, spectra: Mapping[str, Tensor], shapes: Mapping[str, Shape], against: Mapping[str, Sides] | None = None
    ) -> "Forecast":
        """spectra: σ² of each module, falling. shapes: (out, in). against: what is known of B and of A, by module."""
        known = against or {}
        energies = {name: values[values > 0].double().cpu().numpy() for name, values in spectra.items()}
        found = [
            component_items(own, shapes[name], known.get(name, (None, None)))
            for name, own in energies.items()
            if len(own)
        ]
        owners = np.repeat(np.arange(len(energies)), [len(own) for own in energies.values()])
        return cls(Hull.joined([items.hull() for items in found]) if found else None, owners)

    def bits_for(self, lost: float) -> int:
        """Bits of codes that lose about this energy."""
        return self.hull.bits_at(self.hull.within_loss(lost)) if self.hull is not None else 0

    def lost_for(self, bits: int) -> float:
        """The energy that about so many bits of codes lose, every module then made unbiased (`fit.gain`)."""
        if self.hull is None:
            return 0.0
        chosen = self.hull.about_bits(bits)
        left_out = self.hull.energies_at(self.hull.cheapest)  # all of a component
        energies = np.bincount(self.owners, left_out)
        kept = energies - np.bincount(self.owners, self.hull.energies_at(chosen))
        return float(sum(Strength(*pair).lost for pair in zip(energies, kept, strict=True)))
