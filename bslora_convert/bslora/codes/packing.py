"""Codes of one width as bytes, and back.

Eight codes of w bits take w bytes, little end first: code j of eight stands at bits w·j and up. The last eight are filled up
with zeros.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

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
