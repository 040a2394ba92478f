"""One adapted module of a LoRA."""

from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.modules.factors import Factors, Shape


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted module: ΔW = scaling · b @ a as stored, b (out, r), a (r, in).

    kind `embedding`: b (dim, r), a (r, vocabulary), and the layer adds the transposed product to its table.
    """

    b: Tensor
    a: Tensor
    scaling: float
    kind: str = "linear"

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.b.shape[1]

    @property
    def stored(self) -> Factors:
        """The factors as stored, without the scaling."""
        return Factors(self.b, self.a)

    def factors(self) -> Factors:
        """Factors with the scaling folded into b, float32 (float64 where stored so)."""
        dtype = torch.float64 if self.b.dtype == torch.float64 else torch.float32
        return Factors(self.b.to(dtype, copy=True).mul_(self.scaling), self.a.to(dtype))
