"""Numbers in codes of a few bits under a scale for every block, as files of quantised weights hold them.

    x̂ = s_g level(code)                               g: blocks of consecutive numbers of a vector; its last may be shorter

    rtn(b)      level = code − (2^(b−1) − 1)           s = max |x| / (2^(b−1) − 1): round to nearest, absmax
    affine(b)   level = code − z_g                     s = (max x − min x) / (2^b − 1), z = −min x / s, rounded
    sign        level = 2 code − 1                     s = mean |x|, which loses least

Vectors run along what a component has, the columns of B and the rows of A, so that no block mixes components of different
strength; a file holds B transposed. Scales are bfloat16, two bytes as the usual float16 are, which holds any adapter's numbers;
codes are chosen under the scale as it is stored. Zero points take the bits of a code.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from bslora_convert.bslora.codes.packing import pack, packed_bytes

SCALES = torch.bfloat16
TINY = torch.finfo(torch.float32).tiny


class BlockScales(Protocol):
    """A scale for every block, as a file holds it."""

    def decode(self) -> Tensor:
        """(n, blocks), float32."""

    def times(self, by: float) -> "BlockScales":
        """All of them times a number, rounded as they are stored."""

    def stored(self) -> list[Tensor]:
        """What the file holds of them."""


@dataclass(frozen=True, slots=True)
class Plain:
    """BlockScales as they are: (n, blocks) bfloat16."""

    values: Tensor

    def decode(self) -> Tensor:
        """(n, blocks), float32."""
        return self.values.float()

    def times(self, by: float) -> "Plain":
        """All of them times a number, rounded as they are stored."""
        return Plain((by * self.values.float()).to(SCALES))

    def stored(self) -> list[Tensor]:
        """What the file holds of them."""
        return [self.values]


@dataclass(frozen=True, slots=True)
class Blocks:
    """n vectors of length L in codes.

    codes (n, L) uint8, of `bits` bits. levels (2^bits,) float32: constants of the method, in no file. zeros (n, blocks) uint8,
    of as many bits as a code; None where no level is moved. block: numbers under one scale.
    """

    codes: Tensor
    scales: BlockScales
    levels: Tensor
    bits: int
    block: int
    zeros: Tensor | None = None

    @property
    def steps(self) -> Tensor:
        """(n, L), float32: each number's level."""
        levels = self.levels.to(self.codes.device)[self.codes.int()]
        return levels if self.zeros is None else levels - spread(self.zeros.float(), self.block, self.codes.shape[1])

    def decode(self) -> Tensor:
        """(n, L), float32."""
        return self.steps * spread(self.scales.decode(), self.block, self.codes.shape[1])

    def times(self, by: float) -> "Blocks":
        """The same codes under scales times a number."""
        return replace(self, scales=self.scales.times(by))

    def stored(self) -> list[Tensor]:
        """What a file holds: packed codes, scales, packed zero points."""
        packed = [pack(part.reshape(-1).cpu(), self.bits) for part in (self.codes, self.zeros) if part is not None]
        return packed + self.scales.stored()

    @property
    def bytes(self) -> int:
        """Bytes of what is stored."""
        return sum(tensor.nbytes for tensor in self.stored())


@dataclass(frozen=True, slots=True)
class Grid:
    """A way to code vectors. encode: (n, L) float32 -> their codes. beside: bytes that so many blocks take beside codes."""

    bits: int
    block: int
    encode: Callable[[Tensor], Blocks]
    beside: Callable[[int], int]

    def bytes(self, vectors: int, length: int) -> int:
        """What `Blocks.bytes` will be of so many vectors."""
        return packed_bytes(vectors * length, self.bits) + self.beside(vectors * -(-length // self.block))


def in_blocks(x: Tensor, block: int) -> Tensor:
    """(n, L) -> (n, blocks, block), the last one filled up with zeros."""
    missing = -x.shape[1] % block
    return pad(x, (0, missing)).reshape(x.shape[0], (x.shape[1] + missing) // block, block)


def spread(of_blocks: Tensor, block: int, length: int) -> Tensor:
    """(n, blocks) -> (n, L): each number's."""
    return of_blocks.repeat_interleave(block, 1)[:, :length]


def rtn(bits: int, block: int) -> Grid:
    """Symmetric levels, the largest number of a block at the last of them."""
    most = 2 ** (bits - 1) - 1
    levels = torch.arange(2**bits, dtype=torch.float32) - most

    def encode(x: Tensor) -> Blocks:
        scales = Plain((in_blocks(x, block).abs().amax(-1) / most).to(SCALES))
        steps = _in_steps(x, scales, block)
        return Blocks((steps.round().clamp(-most, most) + most).to(torch.uint8), scales, levels, bits, block)

    return Grid(bits, block, encode, lambda blocks: SCALES.itemsize * blocks)


def affine(bits: int, block: int) -> Grid:
    """Equal steps from the least to the largest number of a block, zero counted as one of it and exact."""
    most = 2**bits - 1
    levels = torch.arange(2**bits, dtype=torch.float32)

    def encode(x: Tensor) -> Blocks:
        least, largest = in_blocks(x, block).aminmax(dim=-1)
        least, largest = least.clamp_max(0), largest.clamp_min(0)
        scales = Plain(((largest - least) / most).to(SCALES))
        zeros = (-least / scales.decode().clamp_min(TINY)).round().clamp(0, most)
        moved = _in_steps(x, scales, block).round() + spread(zeros, block, x.shape[1])
        codes = moved.clamp(0, most).to(torch.uint8)
        return Blocks(codes, scales, levels, bits, block, zeros.to(torch.uint8))

    return Grid(bits, block, encode, lambda blocks: SCALES.itemsize * blocks + packed_bytes(blocks, bits))


def sign(block: int) -> Grid:
    """One bit a number."""
    levels = torch.tensor([-1.0, 1.0])

    def encode(x: Tensor) -> Blocks:
        numbers = in_blocks(torch.ones(1, x.shape[1], device=x.device), block).sum(-1)
        scales = Plain((in_blocks(x.abs(), block).sum(-1) / numbers).to(SCALES))
        return Blocks((x >= 0).to(torch.uint8), scales, levels, 1, block)

    return Grid(1, block, encode, lambda blocks: SCALES.itemsize * blocks)


def _in_steps(x: Tensor, scales: Plain, block: int) -> Tensor:
    return x / spread(scales.decode().clamp_min(TINY), block, x.shape[1])
