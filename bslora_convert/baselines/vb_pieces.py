"""How VB-LoRA cuts factors into pieces of one length, which length that is, and how PEFT names what is stored of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.baselines.baseline import OutOfReach
from bslora_convert.baselines.vector_bank import Mixing
from bslora_convert.lora.keys import PREFIX
from bslora_convert.modules.factors import Factors, Shape

LONGEST = 256  # of a bank's vectors, the length that the paper uses
SHORTEST = 8  # below it the indices outweigh the bank

TOPK = 2  # vectors of a mixture


@dataclass(frozen=True, slots=True)
class PieceLayout:
    """Where the pieces of each module stand in one table: first those of A, row by row, then those of B, block by block."""

    shapes: Mapping[str, Shape]
    rank: int
    length: int

    @property
    def counts(self) -> list[tuple[int, int]]:
        """Pieces of A and of B of each module."""
        return [
            (self.rank * width // self.length, self.rank * out // self.length) for out, width in self.shapes.values()
        ]

    def pieces(self, factors: Factors) -> Tensor:
        """A module's factors of at most the layout's rank, padded with zeros, cut up: (n_m, b)."""
        missing = self.rank - factors.rank
        a = torch.nn.functional.pad(factors.a, (0, 0, 0, missing))
        b = torch.nn.functional.pad(factors.b, (0, missing))
        blocks = b.view(-1, self.length, self.rank).transpose(1, 2)
        return torch.cat([a.reshape(-1, self.length), blocks.reshape(-1, self.length)])

    def costs(self, factors: Factors) -> Tensor:
        """What an error of each piece costs in the update, to first order: (n_m,)."""
        missing = self.rank - factors.rank
        of_a = torch.nn.functional.pad(factors.b.square().sum(0), (0, missing))
        of_b = torch.nn.functional.pad(factors.a.square().sum(1), (0, missing))
        out, width = factors.shape
        return torch.cat([of_a.repeat_interleave(width // self.length), of_b.repeat(out // self.length)])

    def joined(self, vectors: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The table (n, b) as B (out, r) and A (r, in) of each module."""
        sizes = [count for pair in self.counts for count in pair]
        parts = iter(vectors.split(sizes))
        pairs = zip(parts, parts, strict=True)
        return [
            (b.view(-1, self.rank, self.length).transpose(1, 2).reshape(-1, self.rank), a.reshape(self.rank, -1))
            for a, b in pairs
        ]


def vector_length(shapes: Mapping[str, Shape]) -> int:
    """The largest length up to 256 that divides every side.

    :raises OutOfReach: when that is less than 8.
    """
    common = math.gcd(*(side for shape in shapes.values() for side in shape))
    length = max(divisor for divisor in range(1, LONGEST + 1) if common % divisor == 0)
    if length < SHORTEST:
        raise OutOfReach(
            f"VB-LoRA cuts all sides into pieces of one length; the largest that divides them is {length}, "
            f"{SHORTEST} is the least of use"
        )
    return length


def saved(name: str, shape: Shape, mixing: Mixing, layout: PieceLayout, size: int) -> dict[str, Tensor]:
    """One module's tensors in PEFT's names and shapes: indices (…, 2), shares (…, 1) of the first."""
    out, width = shape
    index_dtype = torch.uint8 if size < 2**8 else torch.int16 if size < 2**15 else torch.int32
    grids = {"A": (layout.rank, width // layout.length), "B": (out // layout.length, layout.rank)}
    counts = [math.prod(grid) for grid in grids.values()]
    indices = torch.stack([mixing.first, mixing.second], dim=-1).to(index_dtype).split(counts)
    shares = mixing.share[:, None].float().split(counts)
    tensors = {}
    for (side, grid), pair, share in zip(grids.items(), indices, shares, strict=True):
        key = f"{PREFIX}{name}.vblora_logits_{side}"
        tensors[f"{key}_topk_indices"] = pair.reshape(*grid, TOPK)
        tensors[f"{key}_topk_weights"] = share.reshape(*grid, TOPK - 1)
    return tensors
