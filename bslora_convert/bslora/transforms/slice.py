"""Slice Sharing (SS): a module uses a window of the shared factors.

    shared   B_s (S_out, r)      A_s (r, S_in)       S_out, S_in: the largest module's sizes
    module   B = B_s[o : o+out]  A = A_s[:, i : i+in]

The window sits in the centre (the authors' code), at the top left (equation 3 of the paper) or at the
bottom right. A module keeps nothing of its own; where the methods take a kernel, as KE's do, it is a single one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from bslora_convert.modules.factors import Factors, Shape, Use

WINDOWS = ("center", "top-left", "bottom-right")


@dataclass(frozen=True, slots=True)
class Slice:
    """Shared factors of the sizes (S_out, S_in) and where each module's window sits."""

    name: ClassVar[str] = "ss"
    own_names: ClassVar[tuple[str, ...]] = ()
    carrier: ClassVar[str | None] = None

    size_out: int
    size_in: int
    window: str = "center"

    def __post_init__(self) -> None:
        if self.window not in WINDOWS:
            raise ValueError(f"window is {self.window!r}, one of {', '.join(WINDOWS)} is allowed")

    @classmethod
    def covering(cls, shapes: Iterable[Shape], window: str = "center") -> "Slice":
        """The smallest shared factors that hold a window for every shape."""
        shapes = list(shapes)
        return cls(max(n for n, _ in shapes), max(d for _, d in shapes), window)

    @property
    def pair_sizes(self) -> Shape:
        """Rows of B_s and columns of A_s."""
        return self.size_out, self.size_in

    def own_shapes(self, shape: Shape, kernel_rank: int) -> dict[str, Shape]:
        """Shapes of what a module keeps for one shared path: nothing."""
        return {}

    def path_rank(self, pair_rank: int, own: Mapping[str, Tensor]) -> int:
        """Rank of one shared path once expanded."""
        return pair_rank

    def offset(self, size: int, length: int) -> int:
        """Where a window of `length` starts in `size` (section 2.1 of the authors' code: floor division)."""
        return {"center": (size - length) // 2, "top-left": 0, "bottom-right": size - length}[self.window]

    def spread(self, x: Tensor, length: int, kernel: Tensor) -> Tensor:
        """Window of the rows of x: (S, q) -> (length, q)."""
        start = self.offset(x.shape[0], length)
        return x[start : start + length]

    def gather(self, y: Tensor, size: int, kernel: Tensor) -> Tensor:
        """Adjoint of `spread`: (length, q) -> (1, S, q), zero outside the window."""
        out = y.new_zeros((1, size, y.shape[1]))
        start = self.offset(size, y.shape[0])
        out[0, start : start + y.shape[0]] = y
        return out

    def coverage(self, length: int, size: int, kernel: Tensor) -> Tensor:
        """Diagonal of spread-adjoint times spread: (1, 1, S), one inside the window."""
        out = torch.zeros((1, 1, size), dtype=torch.float64)
        start = self.offset(size, length)
        out[..., start : start + length] = 1.0
        return out

    def factors(self, pair: Factors, own: Mapping[str, Tensor], shape: Shape) -> Factors:
        """The module's term: windows of B_s and A_s, rank r."""
        unused = pair.b.new_ones((1, 1))
        return Factors(self.spread(pair.b, shape[0], unused), self.spread(pair.a.T, shape[1], unused).T)

    def add_(self, y: Tensor, x: Tensor, uses: Sequence[Use]) -> Tensor:
        """Adds the terms, applied to the rows of x (n, in), to y (n, out) in place: both windows are views."""
        out, width = y.shape[1], x.shape[1]
        down, across = self.offset(self.size_out, out), self.offset(self.size_in, width)
        for pair, _ in uses:
            y.addmm_(linear(x, pair.a[:, across : across + width]), pair.b[down : down + out].T)
        return y
