"""Numbers of a whole file's codes: all vectors of one width after another, then cut into tensors.

    x̂ = s_g · value      g: the number's group, in the order of the file; its value by a window of codes, or a level

A few thousand numbers at once, so that levels stay in a core's cache until they are scaled and rounded: one pass through memory
for each width and one to put the vectors of a tensor together. Many numbers of a trellis are read by a compiled loop (`walk`),
and on a GPU as many at once as the card's memory easily holds.
"""

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, groupby

import torch
from torch import Tensor

from bslora_convert.bslora.coding.coded import GROUP, from_vectors, groups_of, vectors_shape
from bslora_convert.bslora.coding.packing import levels_of
from bslora_convert.bslora.coding.trellis import tables, values_of
from bslora_convert.bslora.coding.walk import walk
from bslora_convert.modules.factors import Shape
from bslora_convert.process.compiled import can_compile

GROUPS_AT_ONCE = 64
GROUPS_ON_DEVICE = 1 << 12  # at once, where a launch costs more than memory does
VECTORS_AT_ONCE = 64
MANY = 1 << 18  # numbers of one width from which starting the compiler is worth it


def numbers_of(
    packed: Tensor,
    width: int,
    scales: Tensor,
    lengths: Tensor,
    dtype: torch.dtype,
    trellis: bool,
    first: int = 0,
    among: int = 0,
) -> Tensor:
    """The numbers of whole vectors of one width, in `dtype`, on the device of their codes.

    scales: of all their groups, float32, beside the codes. lengths: (vectors,) int64, on the CPU. trellis: whether they are read
    by windows. first: the number of the stream with which the first of them begins. among: how many numbers are read like this
    in all, where that is more than these: the compiler is started once for all of them.
    """
    if trellis and packed.device.type == "cpu" and max(int(lengths.sum()), among) >= MANY and can_compile():
        return _walked(packed, width, scales, lengths, dtype, first)
    sizes = group_sizes(lengths)
    values = torch.empty(int(lengths.sum()), dtype=dtype, device=packed.device)
    begins = lengths.cumsum(0) - lengths
    at_once = GROUPS_AT_ONCE if packed.device.type == "cpu" else GROUPS_ON_DEVICE
    at = 0
    for size, scale in zip(sizes.split(at_once), scales.split(at_once), strict=True):
        count, largest = int(size.sum()), int(size.max())
        if trellis:
            begin, end = torch.searchsorted(begins, torch.tensor([at, at + count])).tolist()
            levels = values_of(packed, width, first + at, count, begins[begin:end] - at, lengths[begin:end])
        else:
            levels = levels_of(packed, width, first + at, count)
        if count == largest * size.numel():
            levels.view(-1, largest).mul_(scale[:, None])
        else:
            levels.mul_(scale.repeat_interleave(size.to(scale.device), output_size=count))
        values[at : at + count] = levels
        at += count
    return values


def _walked(packed: Tensor, width: int, scales: Tensor, lengths: Tensor, dtype: torch.dtype, first: int) -> Tensor:
    """`numbers_of` a trellis, some whole vectors at a time, as many of these at once as torch has threads."""
    values = torch.empty(int(lengths.sum()), dtype=dtype)
    stream, table, loop = packed.numpy(), tables()[width].numpy(), walk()
    vectors, groups = lengths.split(VECTORS_AT_ONCE), groups_of(lengths).split(VECTORS_AT_ONCE)
    sizes, several = [int(own.sum()) for own in vectors], [int(counts.sum()) for counts in groups]

    def read(out: Tensor, own: Tensor, scale: Tensor, at: int) -> None:
        found = out if dtype == torch.float32 else torch.empty(out.numel())
        loop(stream, width, first + at, own.numpy(), scale.numpy(), table, found.numpy())
        if found is not out:
            out.copy_(found)

    parts = (values.split(sizes), vectors, scales.split(several), accumulate(sizes, initial=0))
    threads = min(torch.get_num_threads(), len(sizes))
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            deque(pool.map(read, *parts), maxlen=0)
    else:
        deque(map(read, *parts), maxlen=0)
    return values


def group_sizes(lengths: Tensor) -> Tensor:
    """(vectors,) -> numbers in each of their groups, (groups,): GROUP, and what is left in a vector's last."""
    groups = groups_of(lengths)
    sizes = torch.full((int(groups.sum()),), GROUP)
    sizes[groups.cumsum(0) - 1] = lengths - (groups - 1) * GROUP
    return sizes


def tensors_of(
    shapes: Iterable[tuple[str, Shape]], widths: Tensor, numbers: Mapping[int, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Every tensor by key, its vectors taken in order from the numbers of their widths. widths: of all vectors."""
    device = next((values.device for values in numbers.values()), None)
    runs: dict[int, list[int]] = {width: [] for width in numbers}
    cuts: list[tuple[str, Shape, Shape, list[int]]] = []
    row, named = 0, widths.tolist()
    for key, shape in shapes:
        count, length = vectors_shape(key, shape)
        order = []
        for width, run in groupby(named[row : row + count]):
            runs[width].append(length * len(list(run)))
            order.append(width)
        cuts.append((key, shape, (count, length), order))
        row += count
    parts = {width: iter(values.split(runs[width])) for width, values in numbers.items()}
    found = {}
    for key, shape, size, order in cuts:
        vectors = [next(parts[width]) for width in order] or [torch.empty(0, dtype=dtype, device=device)]
        found[key] = from_vectors(key, torch.cat(vectors).view(size), shape)
    return found
