"""Kronecker Extension (KE): a module repeats one small block on a grid, each copy scaled (equation 6).

    shared   B_s (s, p)                     A_s (p, s)
    module   K_B (out/s, k), K_A (k, in/s)  the module's own kernels
    B = K_B ⊗ B_s    A = K_A ⊗ A_s    B A = (K_B K_A) ⊗ (B_s A_s)    rank k·p

            ┌─────────┬─────────┐
            │ κ11 · P │ κ12 · P │      P = B_s A_s (s, s)
    B A  =  ├─────────┼─────────┤      κ = K_B K_A (out/s, in/s)
            │ κ21 · P │ κ22 · P │
            └─────────┴─────────┘

A size that s does not divide is covered by one more copy, cut at the edge.
The variants of the paper split a path's rank r between the two: `r_1` p = r, k = 1 (the one that the authors
released), `1_r` p = 1, k = r, and `2_r` p = 2, k = r.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from bslora_convert.modules.factors import Factors, Shape, Use

DEFAULT_SIZE = 256
SMALLEST_DIVISOR = 32  # below this, kernels cost more than an uneven edge loses


def split_rank(kernel: str, rank: int) -> tuple[int, int]:
    """(shared rank p, kernel rank k) of a path of rank `rank` in the variant `kernel`."""
    if rank == 0:
        return 0, 0
    return {"r_1": (rank, 1), "1_r": (1, rank), "2_r": (2, rank)}[kernel]


@dataclass(frozen=True, slots=True)
class Kronecker:
    """Shared factors of size s."""

    name: ClassVar[str] = "ke"
    own_names: ClassVar[tuple[str, ...]] = ("A", "B")
    carrier: ClassVar[str | None] = "B"

    size: int

    @classmethod
    def dividing(cls, shapes: Iterable[Shape], size: int | None = None) -> "Kronecker":
        """The largest size up to 256 that divides every side; 256 with cut edges where only tiny sizes do.

        A size that is asked for is used as it is.
        """
        sides = [side for shape in shapes for side in shape]
        if size is None:
            common = math.gcd(*sides)
            size = max(s for s in range(1, min(DEFAULT_SIZE, common) + 1) if common % s == 0)
            if size < SMALLEST_DIVISOR:
                size = min(DEFAULT_SIZE, min(sides))
        return cls(size)

    @property
    def pair_sizes(self) -> Shape:
        """Rows of B_s and columns of A_s."""
        return self.size, self.size

    def grid(self, shape: Shape) -> Shape:
        """Copies down and across that cover a module."""
        return -(-shape[0] // self.size), -(-shape[1] // self.size)

    def own_shapes(self, shape: Shape, kernel_rank: int) -> dict[str, Shape]:
        """Shapes of a module's kernels for one shared path; a kernel's rank can't exceed its grid."""
        down, across = self.grid(shape)
        rank = min(kernel_rank, down, across)
        return {"A": (rank, across), "B": (down, rank)}

    def path_rank(self, pair_rank: int, own: Mapping[str, Tensor]) -> int:
        """Rank of one shared path once expanded: k·p."""
        return pair_rank * own["A"].shape[0]

    def spread(self, x: Tensor, length: int, kernel: Tensor) -> Tensor:
        """Kernel ⊗ x, cut to `length` rows: (s, q), (grid, k) -> (length, k·q), column t·q + j."""
        copies = kernel[:, None, :, None] * x[None, :, None, :]  # (grid, s, k, q)
        return copies.reshape(kernel.shape[0] * x.shape[0], -1)[:length]

    def gather(self, y: Tensor, size: int, kernel: Tensor) -> Tensor:
        """Adjoint of `spread`, kernel column by kernel column: (length, q), (grid, k) -> (k, s, q)."""
        blocks = self.blocks(y, kernel.shape[0])
        if blocks.stride(2) == 1:
            flat = blocks.reshape(blocks.shape[0], -1)
            return (kernel.T @ flat).reshape(kernel.shape[1], size, y.shape[1])
        return (kernel.T @ blocks.permute(2, 0, 1)).permute(1, 2, 0)  # a transposed y, read in its own order

    def project(self, y: Tensor, basis: Tensor) -> Tensor:
        """Every block's part along a basis: (length, q), (s, p) -> (grid, p, q)."""
        blocks = self.blocks(y, -(-y.shape[0] // self.size))
        if blocks.stride(2) == 1:
            return basis.T @ blocks
        return (blocks.permute(2, 0, 1) @ basis).permute(1, 2, 0)

    def blocks(self, y: Tensor, grid: int) -> Tensor:
        """Rows of y cut into blocks of s: (length, q) -> (grid, s, q), zeros beyond the edge; a view where nothing is cut."""
        missing = grid * self.size - y.shape[0]
        if missing:
            y = torch.cat([y, y.new_zeros((missing, y.shape[1]))])
        cut: Tensor = y.unflatten(0, (grid, self.size))
        return cut

    def coverage(self, length: int, size: int, kernel: Tensor) -> Tensor:
        """Diagonals of spread-adjoint times spread, for each pair of kernel columns: (k, k, s)."""
        kernel = kernel.double()
        whole = length // size
        weight = (kernel[:whole].T @ kernel[:whole])[..., None].repeat(1, 1, size)
        edge = length - whole * size
        if edge:
            weight[..., :edge] += torch.outer(kernel[whole], kernel[whole])[..., None]
        return weight

    def divides(self, shape: Shape) -> bool:
        """Whether the grid covers the module with whole copies only."""
        return shape[0] % self.size == 0 and shape[1] % self.size == 0

    def factors(self, pair: Factors, own: Mapping[str, Tensor], shape: Shape) -> Factors:
        """The module's term: (K_B ⊗ B_s, K_A ⊗ A_s), cut at the edges, rank k·p."""
        return Factors(self.spread(pair.b, shape[0], own["B"]), self.spread(pair.a.T, shape[1], own["A"].T).T)

    def add_(self, y: Tensor, x: Tensor, uses: Sequence[Use]) -> Tensor:
        """Adds the terms, applied to the rows of x (n, in), to y (n, out) in place; no Kronecker product is ever built.

        K_A folds the blocks of x into one (or k), the small factors turn it, K_B repeats it over the blocks of y:
        X (n, in/s, s) -> K_A X (n, k, s) -> (K_A X) A_sᵀ B_sᵀ (n, k, s) -> Y (n, out/s, s).
        """
        n, (down, across) = x.shape[0], self.grid((y.shape[1], x.shape[1]))
        whole = down * self.size == y.shape[1] and y.is_contiguous()
        blocks = self.padded(x, across).view(n, across, self.size)
        written = y.view(n, down, self.size) if whole else y.new_zeros(n, down, self.size)
        for pair, own in uses:
            if n == 1:  # a decoding step: plain products are several times faster than batched ones of one
                turned = linear(linear(own["A"] @ blocks[0], pair.a), pair.b)
                written[0].addmm_(own["B"], turned)
            else:
                turned = linear(linear(own["A"] @ blocks, pair.a), pair.b)
                written.baddbmm_(own["B"].expand(n, -1, -1), turned)
        return y if whole else y.add_(written.view(n, down * self.size)[:, : y.shape[1]])

    def padded(self, x: Tensor, grid: int) -> Tensor:
        """Columns of x with zeros up to whole blocks; x itself where nothing is missing."""
        missing = grid * self.size - x.shape[1]
        return pad(x, (0, missing)) if missing else x.contiguous()
