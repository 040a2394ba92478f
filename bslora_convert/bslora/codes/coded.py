"""A matrix in codes, its vectors coded one by one.

    x̂_v = s_{v,g} · value      v: vector, g: its groups of GROUP numbers (the last may be shorter)

A value is the table's entry for a window of the vector's codes (`trellis`).

Vectors run along what a component has: the columns of B, the rows of A. A kernel or a gate is one vector. A vector of 16 bits is
in bfloat16, as scales are, and has none. A vector of no bits is zero.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from bslora_convert.bslora.codes.trellis import tables, windows_of
from bslora_convert.bslora.codes.widths import NONE, UNSCALED
from bslora_convert.modules.factors import Shape

GROUP = 1024
SCALES = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Coded:
    """n vectors of length L.

    widths (n,) uint8. codes (n, L) uint8, zero where the width is 0 or 16. scales (n, groups) bfloat16. exact (n, L) bfloat16,
    zero where the width is not 16; None where no vector has it.
    """

    widths: Tensor
    codes: Tensor
    scales: Tensor
    exact: Tensor | None = None

    def decode(self) -> Tensor:
        """(n, L), float32."""
        n, length = self.codes.shape
        values = torch.zeros(n, length)
        for width in self.widths.unique().tolist():
            chosen = self.widths == width
            if width == 16:
                assert self.exact is not None  # stated by the class
                values[chosen] = self.exact[chosen].float()
            elif width != NONE:
                found = tables()[width][windows_of(self.codes[chosen], width)]
                values[chosen] = found * spread(self.scales[chosen], length)
        return values

    def scaled(self, by: float | Tensor) -> "Coded":
        """The same codes under scales times `by`, numbers of 16 bits times it; rounded as they are stored. A tensor: (n, 1)."""
        exact = None if self.exact is None else (by * self.exact.float()).to(SCALES)
        return replace(self, scales=(by * self.scales.float()).to(SCALES), exact=exact)


Length = TypeVar("Length", int, Tensor)
Vector = tuple[int, int]  # width, length


def groups_of(length: Length) -> Length:
    """Scales of one vector, or of each of many, whole numbers."""
    return -(-length // GROUP)


def bits_of(length: int, width: int) -> int:
    """Bits that one vector takes: its numbers, its scales, and the byte that names its width."""
    return 8 + width * length + (0 if width in UNSCALED else 16 * groups_of(length))


def vectors_of(tensors: Iterable[Coded]) -> list[Vector]:
    """Width and length of every vector."""
    return [(width, coded.codes.shape[1]) for coded in tensors for width in coded.widths.tolist()]


def bits_in(vectors: Iterable[Vector]) -> int:
    """Bits that vectors take together."""
    return sum(bits_of(length, width) for width, length in vectors)


def spread(scales: Tensor, length: int) -> Tensor:
    """(n, groups) -> (n, L), float32: each number's scale."""
    return scales.float().repeat_interleave(GROUP, 1)[:, :length]


def is_own(key: str) -> bool:
    """Whether the tensor is a kernel or a gate, by the last part of its key: a module may be called anything."""
    return "_own_" in key.rpartition(".bslora_")[2]


def vectors_shape(key: str, shape: Shape) -> Shape:
    """(n, L) of a form's tensor by its key and shape."""
    if is_own(key):
        return 1, int(torch.Size(shape).numel())
    return (shape[1], shape[0]) if key.endswith("_B") else (shape[0], shape[1])


def to_vectors(key: str, tensor: Tensor) -> Tensor:
    """A form's tensor as vectors, (n, L)."""
    if is_own(key):
        return tensor.reshape(1, -1)
    return tensor.T if key.endswith("_B") else tensor


def from_vectors(key: str, vectors: Tensor, shape: Sequence[int]) -> Tensor:
    """The tensor of these vectors."""
    if is_own(key):
        return vectors.reshape(shape)
    return vectors.T if key.endswith("_B") else vectors
