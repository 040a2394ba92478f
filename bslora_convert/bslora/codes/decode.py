"""Numbers of a whole file's codes: all vectors of one width after another, then cut into tensors.

    x̂ = s_g · value      g: the number's group, in the order of the file; its value by a window of codes

A few thousand numbers at once, so that values stay in a core's cache until they are scaled and rounded: one pass through memory
for each width and one to put the vectors together; on a GPU as many at once as the card's memory easily holds. Many
numbers are read by a compiled loop (`walk`) in the order of the file, in one pass.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from bslora_convert.bslora.codes.coded import GROUP, from_vectors, groups_of, vectors_shape
from bslora_convert.bslora.codes.trellis import TRELLIS_WIDTHS, tables, values_of
from bslora_convert.bslora.codes.walk import walk
from bslora_convert.bslora.codes.widths import UNSCALED
from bslora_convert.modules.factors import Shape
from bslora_convert.process.compiled import can_compile

GROUPS_AT_ONCE = 64
GROUPS_ON_DEVICE = 1 << 12  # at once, where a launch costs more than memory does
VECTORS_AT_ONCE = 64
MANY = 1 << 18  # numbers from which starting the compiler is worth it
NOTHING = np.zeros(0, np.uint8)


def numbers_of(
    packed: Tensor,
    width: int,
    scales: Tensor,
    lengths: Tensor,
    dtype: torch.dtype,
    first: int = 0,
) -> Tensor:
    """The numbers of whole vectors of one width, in `dtype`, on the device of their codes.

    scales: of all their groups, float32, beside the codes. lengths: (vectors,) int64, on the CPU. first: the number of the
    stream with which the first of them begins.
    """
    sizes = group_sizes(lengths)
    values = torch.empty(int(lengths.sum()), dtype=dtype, device=packed.device)
    begins = lengths.cumsum(0) - lengths
    at_once = GROUPS_AT_ONCE if packed.device.type == "cpu" else GROUPS_ON_DEVICE
    at = 0
    for size, scale in zip(sizes.split(at_once), scales.split(at_once), strict=True):
        count, largest = int(size.sum()), int(size.max())
        begin, end = torch.searchsorted(begins, torch.tensor([at, at + count])).tolist()
        found = values_of(packed, width, first + at, count, begins[begin:end] - at, lengths[begin:end])
        if count == largest * size.numel():
            found.view(-1, largest).mul_(scale[:, None])
        else:
            found.mul_(scale.repeat_interleave(size.to(scale.device), output_size=count))
        values[at : at + count] = found
        at += count
    return values


def make_ready() -> None:
    """Has what the first adapter would pay for done: the loop compiled, the tables read."""
    if can_compile():
        one = torch.tensor([1])
        walked({1: torch.zeros(GROUP // 8, dtype=torch.uint8)}, {}, one, one * GROUP, torch.ones(1), torch.float32)


def is_walked(device: torch.device, numbers: int) -> bool:
    """Whether so many numbers, on that device, are worth the compiler's start."""
    return device.type == "cpu" and numbers >= MANY and can_compile()


def walked(
    streams: Mapping[int, Tensor],
    firsts: Mapping[int, int],
    widths: Tensor,
    lengths: Tensor,
    scales: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The numbers of whole vectors of any widths in their order, in `dtype`, as many vectors at once as torch has threads.

    streams: codes by width, and the numbers of 16 bits. firsts: by width the number with which the first of them begins.
    widths, lengths: (vectors,). scales: of all their groups, float32.
    """
    loop, table = walk(), _tables()
    named, sizes, scale = widths.numpy(), lengths.numpy(), scales.numpy()  # of a few vectors NumPy counts faster
    starts, total = range(0, len(named), VECTORS_AT_ONCE), int(sizes.sum())
    counted = np.zeros((len(starts), len(TRELLIS_WIDTHS) + 1), np.int64)
    exact, held = np.zeros(0, np.float32), [NOTHING] * len(TRELLIS_WIDTHS)
    for width, stream in streams.items():
        own, first = np.where(named == width, sizes, 0), firsts.get(width, 0)
        before = (own.cumsum() - own)[::VECTORS_AT_ONCE]
        if width == 16:
            counted[:, 0], exact = before, stream[first : first + int(own.sum())].float().numpy()
        else:
            counted[:, width], held[width - 1] = before + first, stream.numpy()
    several = np.where(np.isin(named, UNSCALED), 0, groups_of(lengths).numpy())
    at, group = np.append(sizes.cumsum() - sizes, total), several.cumsum() - several
    values = _empty(total, dtype)

    def read(own: Sequence[int]) -> None:
        """Some of `starts`, by one thread, which keeps its room for numbers that are rounded."""
        ends = [min(start + VECTORS_AT_ONCE, len(named)) for start in own]
        most = max(int(at[end] - at[start]) for start, end in zip(own, ends, strict=True))
        room = None if dtype == torch.float32 else torch.empty(most)
        for start, end in zip(own, ends, strict=True):
            out = values[at[start] : at[end]]
            found = out if room is None else room[: out.numel()]
            loop(
                tuple(held), counted[start // VECTORS_AT_ONCE], named[start:end], sizes[start:end], scale[group[start] :], table,
                exact, found.numpy(),
            )  # fmt: skip
            if room is not None:
                out.copy_(found)

    threads = min(torch.get_num_threads(), len(starts))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            deque(pool.map(read, (starts[first::threads] for first in range(threads))), maxlen=0)
    elif starts:
        read(starts)
    return values


def _empty(count: int, dtype: torch.dtype) -> Tensor:
    """Room for many numbers. NumPy asks the system for large pages, which half of the reading's time went into without them."""
    return torch.from_numpy(np.empty(count * dtype.itemsize, np.uint8)).view(dtype)


@cache
def _tables() -> np.ndarray:
    """(widths, 4096) float32."""
    return torch.stack([tables()[width] for width in TRELLIS_WIDTHS]).numpy()


def in_order(shapes: Sequence[tuple[str, Shape]], numbers: Tensor) -> dict[str, Tensor]:
    """Every tensor by key, of numbers whose vectors follow each other as the tensors do."""
    sizes = [vectors_shape(key, shape) for key, shape in shapes]
    cut = numbers.split([count * length for count, length in sizes])
    return {
        key: from_vectors(key, own.view(size), shape)
        for (key, shape), own, size in zip(shapes, cut, sizes, strict=True)
    }


def group_sizes(lengths: Tensor) -> Tensor:
    """(vectors,) -> numbers in each of their groups, (groups,): GROUP, and what is left in a vector's last."""
    groups = groups_of(lengths)
    sizes = torch.full((int(groups.sum()),), GROUP)
    sizes[groups.cumsum(0) - 1] = lengths - (groups - 1) * GROUP
    return sizes


def merged(widths: Tensor, lengths: Tensor, numbers: Mapping[int, Tensor], dtype: torch.dtype) -> Tensor:
    """The numbers of vectors in their order, taken from those of each width. widths, lengths: (vectors,)."""
    order = [
        (width, sum(length for _, length in run))
        for width, run in groupby(zip(widths.tolist(), lengths.tolist(), strict=True), key=itemgetter(0))
    ]
    parts = {
        width: iter(values.split([size for other, size in order if other == width]))
        for width, values in numbers.items()
    }
    return torch.cat([next(parts[width]) for width, _ in order] or [torch.empty(0, dtype=dtype)])
