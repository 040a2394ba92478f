"""Codes of one width as bytes, and bytes as the levels that they stand for.

Eight codes of w bits take w bytes, little end first: code j of eight stands at bits w·j and up. The last eight are filled up
with zeros. Reading goes by tables, several codes at a time: a byte holds 8/w codes of 1, 2, 4 or 8 bits, and twelve bits hold
four of 3.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad

from bslora_convert.bslora.coding.levels import LEVELS

EIGHT = 8


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` codes take."""
    return width * -(-count // EIGHT)


def pack(codes: Tensor, width: int) -> Tensor:
    """(n,) codes -> (bytes,), uint8 both."""
    if width == EIGHT:
        return pad(codes, (0, -codes.numel() % EIGHT))
    eights = pad(codes, (0, -codes.numel() % EIGHT)).view(-1, EIGHT).int()
    places = torch.arange(EIGHT, dtype=torch.int32) * width
    words = (eights << places).sum(1, dtype=torch.int64)
    return torch.stack([words >> (8 * byte) & 255 for byte in range(width)], 1).to(torch.uint8).view(-1)


def unpack(packed: Tensor, width: int) -> Tensor:
    """(bytes,) -> codes, those that fill the last eight included; uint8 both."""
    if width == EIGHT:
        return packed
    parts = packed.view(-1, width).long()
    words = (parts << 8 * torch.arange(width)).sum(1)
    codes: Tensor = words[:, None] >> torch.arange(EIGHT) * width & (2**width - 1)
    return codes.to(torch.uint8).view(-1)


def levels_of(packed: Tensor, width: int, count: int) -> Tensor:
    """(bytes,) -> the first `count` levels, float32."""
    if width == 3:
        low, middle, high = packed.view(-1, 3).int().unbind(1)
        index = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], 1)
    else:
        index = packed.int()
    levels: Tensor = embedding(index, _table(width))
    return levels.view(-1)[:count]


@cache
def _table(width: int) -> Tensor:
    """The levels of every byte (every twelve bits for a width of 3): (256 or 4096, codes in it)."""
    bits = 12 if width == 3 else 8
    places = torch.arange(bits // width) * width
    codes = torch.arange(2**bits)[:, None] >> places & (2**width - 1)
    levels: Tensor = LEVELS[width][codes]
    return levels
