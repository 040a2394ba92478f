"""NF4 (QLoRA, arXiv 2305.14314): sixteen quantiles of a normal distribution under an absmax for every 64 numbers.

    x̂ = m_g q[code]           q: the quantiles, from −1 to 1, zero among them; m_g = max |x| of the block
    m̂_g = o + M_h d[code_g]   double quantisation: o the mean of all m, M_h the absmax of 256 of the m − o, d 256 dynamic levels

As bitsandbytes writes a tensor: codes chosen under m itself, read under m̂; o and M in float32. That takes
4 + 8/64 + 32/(64 · 256) = 4.127 bits a number.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bslora_convert.baselines.blocks import TINY, Blocks, Grid, in_blocks, spread

BLOCK = 64
NESTED = 256  # absmaxes under one of the second level
FLOAT = torch.float32.itemsize

# bitsandbytes.functional.get_4bit_type("nf4"), after QLoRA's appendix E.
QUANTILES = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def dynamic_levels() -> Tensor:
    """(256,) rising: a sign, a power of ten and a fraction, finer the larger the power (dynamic tree, arXiv 2110.02861).

    The fractions of the powers 10^(i − 6), i from 0 to 6, are the middles of 2^i equal parts of 0.1 to 1.
    """
    positive = [
        10.0 ** (power - 6) * (0.1 + 0.9 * (part + 0.5) / 2**power) for power in range(7) for part in range(2**power)
    ]
    return torch.tensor(sorted([*positive, *(-level for level in positive), 0.0, 1.0]))


DYNAMIC = dynamic_levels()


@dataclass(frozen=True, slots=True)
class Nested:
    """Absmaxes quantised in turn: codes (n, blocks) uint8, largest (of 256 blocks each,) and offset (), float32."""

    codes: Tensor
    largest: Tensor
    offset: Tensor

    @classmethod
    def of(cls, absmax: Tensor) -> "Nested":
        """Of the absmaxes of one tensor, (n, blocks)."""
        offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
        groups = in_blocks((absmax - offset).view(1, -1), NESTED)[0]
        largest = groups.abs().amax(-1)
        nearest = _nearest(groups / largest.clamp_min(TINY)[:, None], DYNAMIC)
        return cls(nearest.reshape(-1)[: absmax.numel()].view(absmax.shape), largest, offset)

    def decode(self) -> Tensor:
        """(n, blocks), float32."""
        largest = spread(self.largest[None], NESTED, self.codes.numel()).view(self.codes.shape)
        return DYNAMIC.to(largest.device)[self.codes.int()] * largest + self.offset

    def times(self, by: float) -> "Nested":
        """All of them times a number: the second level takes it, in float32."""
        return replace(self, largest=by * self.largest, offset=by * self.offset)

    def stored(self) -> list[Tensor]:
        """What the file holds of them."""
        return [self.codes, self.largest, self.offset] if self.codes.numel() else []


def _encode(x: Tensor) -> Blocks:
    absmax = in_blocks(x, BLOCK).abs().amax(-1)
    steps = x / spread(absmax.clamp_min(TINY), BLOCK, x.shape[1])
    return Blocks(_nearest(steps, QUANTILES), Nested.of(absmax), QUANTILES, 4, BLOCK)


def _nearest(x: Tensor, levels: Tensor) -> Tensor:
    """The code of the nearest of rising levels, uint8."""
    middles = ((levels[1:] + levels[:-1]) / 2).to(x.device)
    return torch.bucketize(x.contiguous(), middles).to(torch.uint8)


def _beside(blocks: int) -> int:
    return blocks + FLOAT * (-(-blocks // NESTED) + 1) if blocks else 0


NF4 = Grid(4, BLOCK, _encode, _beside)
