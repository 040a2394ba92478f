"""Codes of one width as bytes, and bytes as the levels that they stand for.

Eight codes of w bits take w bytes, little end first: code j of eight stands at bits w·j and up. The last eight are filled up
with zeros. Reading goes by tables, several codes at a time: half a byte holds four of 1 bit, a byte four of 2, two of 4 or one
of 8, and twelve bits hold four of 3.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from bslora_convert.bslora.codes.levels import LEVELS

EIGHT = 8
AT_ONCE = 1 << 16  # eights of codes as words of eight bytes


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` codes take."""
    return width * -(-count // EIGHT)


def pack(codes: Tensor, width: int) -> Tensor:
    """(n,) codes -> (bytes,), uint8 both."""
    if width == EIGHT:
        return pad(codes, (0, -codes.numel() % EIGHT))
    eights = pad(codes, (0, -codes.numel() % EIGHT)).view(-1, EIGHT)
    packed = torch.empty((len(eights), width), dtype=torch.uint8)
    for some, out in zip(eights.split(AT_ONCE), packed.split(AT_ONCE), strict=True):
        words = (some.long() << torch.arange(EIGHT) * width).sum(1)
        for byte in range(width):
            out[:, byte] = words >> (8 * byte) & 255
    return packed.view(-1)


def unpack(packed: Tensor, width: int) -> Tensor:
    """(bytes,) -> codes, those that fill the last eight included; uint8 both."""
    if width == EIGHT:
        return packed
    parts = packed.view(-1, width).long()
    words = (parts << 8 * torch.arange(width, device=packed.device)).sum(1)
    codes: Tensor = words[:, None] >> torch.arange(EIGHT, device=packed.device) * width & (2**width - 1)
    return codes.to(torch.uint8).view(-1)


def levels_of(packed: Tensor, width: int, first: int, count: int) -> Tensor:
    """(bytes,) -> levels `first` to `first + count`, float32: a new tensor."""
    skipped = first % EIGHT
    packed = packed[first // EIGHT * width : packed_bytes(first + count, width)]
    if width == 3:
        low, middle, high = packed.view(-1, 3).int().unbind(1)
        index = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], 1).view(-1)
    elif width == 1:
        index = torch.stack([packed & 15, packed >> 4], 1).view(-1).int()
    else:
        index = packed.int()
    levels: Tensor = _table(width, packed.device).index_select(0, index).view(torch.float32)
    return levels[skipped : skipped + count]


# One entry is one number to torch: several levels are looked up by a read of 4, 8 or 16 bytes, four times faster than rows are.
_AT_ONCE = {1: 4, 2: 4, 3: 4, 4: 2, 8: 1}
_ENTRIES = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}


@cache
def _table(width: int, device: torch.device) -> Tensor:
    """The levels of every run of codes that is looked up at once, side by side in one entry."""
    together = _AT_ONCE[width]
    bits = width * together
    places = torch.arange(together) * width
    codes = torch.arange(2**bits)[:, None] >> places & (2**width - 1)
    levels: Tensor = LEVELS[width][codes].contiguous()
    return levels.view(_ENTRIES[together]).view(-1).to(device)
