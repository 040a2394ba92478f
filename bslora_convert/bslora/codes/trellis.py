"""A trellis code: a number is what the last 12 bits of its vector's stream stand for.

    x̂_i = s_g · table[w](bits w·i + w − 12 … w·i + w − 1 of the vector's stream)        zeros before its first bit

A number brings w new bits and shares the others with those before it, so that a vector has 2^w times as many values near each of
its numbers as a code of w bits a number; the best way through is found by Viterbi's search (`coding/viterbi.py`). Reading is a
table look-up, in any order. Windows are read low bit first, as the stream stands in its bytes (`packing`). The tables, of 4096
values each, were trained on normal numbers (`benchmarks/trellis.py`) and are part of the format.

Marcellin and Fischer, 1990; bit shifts in place of a drawn trellis: Tseng and others, 2024.
"""

from collections.abc import Mapping
from functools import cache
from importlib.resources import files

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn.functional import pad

from bslora_convert.bslora.codes.widths import WIDTHS

WINDOW = 12
STATES = 1 << WINDOW
STEPS = 4096  # a table's entries are whole multiples of 1 / STEPS
TRELLIS_WIDTHS = tuple(width for width in WIDTHS if width < 16)
BEFORE = 2  # bytes before a block of eight codes that its windows reach into
EIGHT = 8


@cache
def tables() -> Mapping[int, Tensor]:
    """Width -> (4096,) float32, by window."""
    held = load(files("bslora_convert.bslora.codes").joinpath("trellis.safetensors").read_bytes())["tables"]
    return {width: held[row].float() / STEPS for row, width in enumerate(TRELLIS_WIDTHS)}


@cache
def _table(width: int, device: torch.device) -> Tensor:
    return tables()[width].to(device)


def windows_of(codes: Tensor, width: int) -> Tensor:
    """(n, L) codes as they stand in a file -> (n, L) int32 windows."""
    codes = codes.to(torch.int32)
    found = codes << (WINDOW - width)
    for back in range(1, -(-WINDOW // width)):
        shift = WINDOW - width * (back + 1)
        older = codes[:, :-back]
        found[:, back:] |= older << shift if shift >= 0 else older >> -shift
    return found


def values_of(packed: Tensor, width: int, first: int, count: int, starts: Tensor, lengths: Tensor) -> Tensor:
    """(bytes,) of one width's stream -> the table's values of numbers `first` to `first + count`, float32: a new tensor.

    starts, lengths: of the vectors that begin among these, numbers counted from `first`.
    """
    device = packed.device
    skipped = first % EIGHT
    begin, end = first // EIGHT * width, -(-(first + count) // EIGHT) * width
    padded = torch.cat([packed.new_zeros(max(BEFORE - begin, 0)), packed[max(begin - BEFORE, 0) : end]])
    held = pad(padded.to(torch.int32), (0, 2))
    words = held[:-2] | held[1:-1] << 8 | held[2:] << 16  # from every byte on as many bits as a window may reach over
    blocks = torch.empty(((end - begin) // width, EIGHT), dtype=torch.int32, device=device)
    for place in range(EIGHT):
        byte, shift = divmod(8 * BEFORE - WINDOW + width * (place + 1), 8)
        blocks[:, place] = words[byte : byte + end - begin : width] >> shift & (STATES - 1)
    windows = blocks.view(-1)[skipped : skipped + count]
    for place in range(-(-WINDOW // width) - 1):  # those that reach back beyond the beginning of their vector
        foreign = WINDOW - width * (place + 1)
        reach = (starts[lengths > place] + place).to(device)
        windows[reach] = windows[reach] >> foreign << foreign
    return _table(width, device).index_select(0, windows)


@cache
def reversed_bits(bits: int) -> np.ndarray:
    """(2^bits,): every whole number of so many bits with these in the opposite order."""
    numbers = np.arange(1 << bits)
    found = np.zeros_like(numbers)
    for bit in range(bits):
        found |= (numbers >> bit & 1) << (bits - 1 - bit)
    return found
