"""Codes of a whole form as a few tensors of a safetensors file, and back.

    bslora_widths    uint8    width of every vector, tensors in the layout's order
    bslora_scales    bfloat16 scales of the vectors of 1 to 8 bits, in the same order
    bslora_trellis_<w> uint8  codes of the vectors of w bits, in the same order, packed (`packing`), read by `trellis`
    bslora_floats    bfloat16 numbers of the vectors of 16 bits

Vectors of no bits have their width alone; a module has them only beside its random initialisation (`composed`).

A tensor for each module would cost a header entry each, at a sixteenth of a small adapter a tenth of the file. How many vectors
there are and how long they are follows from the layout, every tensor's length from the widths, and all of it is checked.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bslora_convert.bslora.codes.coded import SCALES, Coded, Vector, groups_of, vectors_shape
from bslora_convert.bslora.codes.decode import in_order, is_walked, merged, numbers_of, walked
from bslora_convert.bslora.codes.packing import pack, packed_bytes, unpack
from bslora_convert.bslora.codes.trellis import TRELLIS_WIDTHS, tables
from bslora_convert.bslora.codes.widths import NONE, UNSCALED, WIDTHS
from bslora_convert.bslora.layout import MIX
from bslora_convert.errors import InputError
from bslora_convert.initialisation.stream import Place
from bslora_convert.modules.factors import Shape

UNSEEN, UNSEEN_TIMES = (
    1 << 28,
    64,
)  # numbers that a file may have drawn or filled with zeros, and for each one that it stores
VERSION = 3  # of the tables and of how codes stand in a file
WIDTHS_NAME, SCALES_NAME, FLOATS_NAME = "bslora_widths", "bslora_scales", "bslora_floats"
# A file's tensors where nothing is coded and all of it would be of one width: the least header.
EMPTY_CODES = dict.fromkeys((WIDTHS_NAME, SCALES_NAME, "bslora_trellis_4"), torch.zeros(0, dtype=torch.uint8))
NAMES = (
    WIDTHS_NAME,
    SCALES_NAME,
    FLOATS_NAME,
    *(f"bslora_trellis_{width}" for width in TRELLIS_WIDTHS),
)


def to_file(tensors: Mapping[str, Coded]) -> dict[str, Tensor]:
    """The file's tensors; an empty one is left out."""
    codes: dict[int, list[Tensor]] = {width: [] for width in WIDTHS}
    scales = []
    for coded in tensors.values():
        for row, width in enumerate(coded.widths.tolist()):
            if width == 16:
                assert coded.exact is not None  # stated by the class
                codes[width].append(coded.exact[row])
            elif width != NONE:
                codes[width].append(coded.codes[row])
                scales.append(coded.scales[row])
    found = {WIDTHS_NAME: torch.cat([coded.widths for coded in tensors.values()])}
    if scales:
        found[SCALES_NAME] = torch.cat(scales)
    for width, vectors in codes.items():
        if vectors:
            whole = torch.cat(vectors)
            found[_name(width)] = whole if width == 16 else pack(whole, width)
    return found


def sizes(vectors: Sequence[Vector]) -> dict[str, Tensor]:
    """What `to_file` would make of vectors of these widths and lengths, without their numbers: tensors on the meta device."""
    numbers, scales = Counter[int](), 0
    for width, length in vectors:
        numbers[width] += length
        scales += 0 if width in UNSCALED else groups_of(length)
    found = {WIDTHS_NAME: torch.empty(len(vectors), dtype=torch.uint8, device="meta")}
    if scales:
        found[SCALES_NAME] = torch.empty(scales, dtype=SCALES, device="meta")
    for width in WIDTHS:
        if count := numbers[width]:
            size, dtype = (count, SCALES) if width == 16 else (packed_bytes(count, width), torch.uint8)
            found[_name(width)] = torch.empty(size, dtype=dtype, device="meta")
    return found


def _name(width: int) -> str:
    return FLOATS_NAME if width == 16 else f"bslora_trellis_{width}"


def coded_tensors(tensors: Mapping[str, Tensor], shapes: Iterable[tuple[str, Shape]]) -> dict[str, Coded]:
    """What `to_file` made the file's tensors from, by key; they have been checked."""
    widths = tensors[WIDTHS_NAME]
    left = {width: unpack(tensors[_name(width)], width) for width in TRELLIS_WIDTHS if width in widths}
    left[16] = tensors.get(FLOATS_NAME, torch.zeros(0, dtype=SCALES))
    scales = tensors.get(SCALES_NAME, torch.zeros(0, dtype=SCALES))
    found, row = {}, 0
    for key, shape in shapes:
        count, length = vectors_shape(key, shape)
        own = widths[row : row + count]
        codes, exact = torch.zeros(count, length, dtype=torch.uint8), torch.zeros(count, length, dtype=SCALES)
        held = torch.zeros(count, groups_of(length), dtype=SCALES)
        for at, width in enumerate(own.tolist()):
            if width == NONE:
                continue
            (exact if width == 16 else codes)[at], left[width] = left[width][:length], left[width][length:]
            if width != 16:
                held[at], scales = scales[: held.shape[1]], scales[held.shape[1] :]
        found[key] = Coded(own, codes, held, exact)
        row += count
    return found


def check_codes(
    tensors: Mapping[str, Tensor],
    shapes: Iterable[tuple[str, Shape]],
    dtype: torch.dtype,
    where: object,
    initial: Mapping[str, Place] | None = None,
) -> None:
    """Refuses codes that can't be decoded to `dtype`.

    shapes: key and shape of each tensor, in the layout's order. initial: places of tensors that are stored against draws.

    :raises InputError: when a tensor is missing, left over, or not what layout and widths ask for.
    """
    shapes, initial = list(shapes), initial or {}
    vectors = sum(vectors_shape(key, shape)[0] for key, shape in shapes)  # before anything is as long as a file says
    widths = _taken(tensors, WIDTHS_NAME, (torch.uint8,), vectors, where).cpu()
    lengths = _lengths(shapes)
    _check_widths(widths, shapes, initial, where)
    _check_unseen(shapes, initial, int(lengths[widths == NONE].sum()), int(lengths.sum()), where)
    counts = {width: int(lengths[widths == width].sum()) for width in WIDTHS}
    scaled = _have_scales(widths)
    groups = groups_of(lengths)
    scales = _taken(tensors, SCALES_NAME, (SCALES,), int(groups[scaled].sum()), where).float()
    if not bool(scales.isfinite().all()):
        raise InputError(f"{where}: {SCALES_NAME} holds NaN or infinite values; the adapter is damaged")
    used = {WIDTHS_NAME, SCALES_NAME} | {_name(width) for width, count in counts.items() if count}
    left = sorted(set(tensors) - used)
    if left:
        raise InputError(f"{where}: tensor {left[0]} belongs to no vector")
    longest = max((place.rank for place in initial.values()), default=0)
    limit = torch.finfo(dtype).max / (1 + longest)  # T A₀ + R is at most r₀ times T's largest, and R's
    for width, count in counts.items():
        if not count:
            continue
        largest = _stored(tensors, width, count, where)
        if width != 16:
            owned = scales[(widths == width).repeat_interleave(groups * scaled).to(scales.device)]
            largest = owned * tables()[width].abs().max()
        if float(largest.abs().max()) > limit:
            raise InputError(
                f"{where}: {_name(width)} decodes to numbers that {dtype} can't hold; the adapter is damaged"
            )


def _check_widths(
    widths: Tensor, shapes: Iterable[tuple[str, Shape]], initial: Mapping[str, Place], where: object
) -> None:
    """Refuses widths that are not known, and vectors of no bits where they would stand for nothing."""
    allowed, at = ", ".join(map(str, WIDTHS)), 0
    unknown = set(widths.tolist()) - {NONE, *WIDTHS}
    if unknown:
        raise InputError(f"{where}: {WIDTHS_NAME} holds {min(unknown)}; {allowed} are allowed")
    absent = (widths == NONE).tolist()
    for key, shape in shapes:
        count, _ = vectors_shape(key, shape)
        own, at = absent[at : at + count], at + count
        if any(own) and key.removesuffix(MIX) not in initial:
            raise InputError(f"{where}: {WIDTHS_NAME} holds {NONE} for {key}; {allowed} are allowed")
        if key.endswith(MIX) and all(own):
            raise InputError(f"{where}: {WIDTHS_NAME} holds {NONE} for all of {key}, which is then not needed")


def _check_unseen(
    shapes: Iterable[tuple[str, Shape]], initial: Mapping[str, Place], absent: int, numbers: int, where: object
) -> None:
    """Refuses files that would have much more drawn, or filled with zeros, than they hold themselves."""
    lengths = {key: vectors_shape(key, shape)[1] for key, shape in shapes if key in initial}
    unseen = absent + sum(initial[key].rank * length for key, length in lengths.items())
    if unseen > UNSEEN + UNSEEN_TIMES * (numbers - absent):
        raise InputError(
            f"{where}: {unseen:,} numbers would be drawn or filled in beside {numbers - absent:,} that are stored; "
            "the adapter is damaged"
        )


@dataclass(frozen=True, slots=True)
class Start:
    """Where a tensor begins in a file: its first vector, its first scale, and by width its first number in the width's stream."""

    vector: int = 0
    scale: int = 0
    numbers: Mapping[int, int] = field(default_factory=dict)


def starts(widths: Tensor, shapes: Iterable[tuple[str, Shape]], first: Start | None = None) -> Iterator[Start]:
    """Where tensors that follow each other begin, and where the last ends. widths: of all vectors; first: of the first tensor."""
    found = first or Start()
    yield found
    for key, shape in shapes:
        count, length = vectors_shape(key, shape)
        numbers, scale = dict(found.numbers), found.scale
        for width, several in Counter(widths[found.vector : found.vector + count].tolist()).items():
            numbers[width] = numbers.get(width, 0) + several * length
            scale += 0 if width in UNSCALED else several * groups_of(length)
        found = Start(found.vector + count, scale, numbers)
        yield found


def decoded(
    tensors: Mapping[str, Tensor],
    shapes: Sequence[tuple[str, Shape]],
    dtype: torch.dtype,
    start: Start | None = None,
    among: int = 0,
) -> dict[str, Tensor]:
    """Tensors that follow each other in a file, in `dtype`, by key, on the device of their codes, which `check_codes` has seen.

    shapes: of these tensors. start: of the first of them; the file's beginning. among: how many numbers are read in all, where
    that is more than these: the compiler is started once for all of them.
    """
    start = start or Start()
    lengths = _lengths(shapes)
    widths = tensors[WIDTHS_NAME][start.vector : start.vector + lengths.numel()].cpu()
    scaled = _have_scales(widths)
    groups = groups_of(lengths)
    several = int(groups[scaled].sum())
    scales = tensors[SCALES_NAME][start.scale : start.scale + several].float() if several else torch.zeros(0)
    streams = {width: tensors[_name(width)] for width in widths.unique().tolist() if width != NONE}
    coded = int(lengths[scaled].sum())
    if coded and is_walked(scales.device, max(coded, among)):
        return in_order(shapes, walked(streams, start.numbers, widths, lengths, scales, dtype))
    absent = int(lengths[widths == NONE].sum())
    numbers = {NONE: torch.zeros(absent, dtype=dtype, device=scales.device)} if absent else {}
    for width, stored in streams.items():
        chosen, first = widths == width, start.numbers.get(width, 0)
        if width == 16:
            numbers[width] = stored[first : first + int(lengths[chosen].sum())].to(dtype)
        else:
            owned = scales[chosen.repeat_interleave(groups * scaled).to(scales.device)]
            numbers[width] = numbers_of(stored, width, owned, lengths[chosen], dtype, first)
    return in_order(shapes, merged(widths, lengths, numbers, dtype))


def stored_numbers(tensors: Mapping[str, Tensor], shapes: Iterable[tuple[str, Shape]], among: str) -> int:
    """Numbers of the tensors with `among` in their keys, those of vectors of no bits left out."""
    widths, at, count = tensors[WIDTHS_NAME], 0, 0
    for key, shape in shapes:
        several, length = vectors_shape(key, shape)
        if among in key:
            count += length * int((widths[at : at + several] != NONE).sum())
        at += several
    return count


def _have_scales(widths: Tensor) -> Tensor:
    return (widths != 16) & (widths != NONE)


def _lengths(shapes: Iterable[tuple[str, Shape]]) -> Tensor:
    """(vectors,) int64, of every tensor's one after another."""
    each = torch.tensor([vectors_shape(key, shape) for key, shape in shapes], dtype=torch.int64).view(-1, 2)
    return each[:, 1].repeat_interleave(each[:, 0])


def _stored(tensors: Mapping[str, Tensor], width: int, count: int, where: object) -> Tensor:
    """The bytes of all codes of one width; (count,) numbers where it is 16."""
    if width == 16:
        floats = _taken(tensors, FLOATS_NAME, (SCALES,), count, where)
        if not bool(floats.isfinite().all()):
            raise InputError(f"{where}: {FLOATS_NAME} holds NaN or infinite values; the adapter is damaged")
        return floats
    name = _name(width)
    packed = _taken(tensors, name, (torch.uint8,), packed_bytes(count, width), where)
    fill = -count % 8 * width
    if fill and bool(unpack(packed[-width:], width)[count % 8 :].any()):
        raise InputError(f"{where}: {name} has codes beyond its last vector")
    return packed


def _taken(
    tensors: Mapping[str, Tensor], name: str, dtypes: tuple[torch.dtype, ...], count: int, where: object
) -> Tensor:
    tensor = tensors.get(name)
    if tensor is None and not count:
        return torch.zeros(0, dtype=dtypes[0])
    if tensor is None:
        raise InputError(f"{where}: tensor {name} is missing")
    if tensor.dtype not in dtypes or tuple(tensor.shape) != (count,):
        raise InputError(
            f"{where}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, {dtypes[0]} ({count},) is expected"
        )
    return tensor
