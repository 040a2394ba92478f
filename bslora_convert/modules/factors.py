"""A matrix held as the product of two thin factors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Factors:
    """The matrix b @ a: b (out, r), a (r, in)."""

    b: Tensor
    a: Tensor

    @property
    def rank(self) -> int:
        """Number of columns of b."""
        return self.a.shape[0]

    @property
    def shape(self) -> Shape:
        """(out, in) of the product."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def parameters(self) -> int:
        """Stored numbers."""
        return self.b.numel() + self.a.numel()

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> "Factors":
        """Both factors in another dtype or on another device."""
        return Factors(self.b.to(device=device, dtype=dtype), self.a.to(device=device, dtype=dtype))

    def padded(self, rank: int) -> "Factors":
        """The same matrix with columns and rows of zeros up to `rank`."""
        missing = max(rank - self.rank, 0)
        return Factors(pad(self.b, (0, missing)), pad(self.a, (0, 0, 0, missing)))


Use = tuple[Factors, Mapping[str, Tensor]]  # a shared pair, and what one module keeps of its own beside it


def add(first: Factors, *others: Factors) -> Factors:
    """Sum of products as one product, ranks adding up: `[b1 b2 …] [a1; a2; …]`."""
    if not others:
        return first
    terms = (first, *others)
    return Factors(torch.cat([t.b for t in terms], dim=1), torch.cat([t.a for t in terms], dim=0))
