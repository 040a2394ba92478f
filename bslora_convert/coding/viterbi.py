"""Viterbi's search for the best codes of the trellis (`bslora.codes.trellis`): the same on every machine.

    state s: the last 12 bits, the newest lowest        s' = (s ≪ w | c) mod 4096
    cost(s') = min over the 2^w states before it of cost(s)  +  (x − value(s'))²

All successors of a state share its upper bits, so that the least of 2^w costs is taken once for 2^w states.

Up to 4 bits costs are 16-bit whole numbers, twice as many to an instruction: x and the values are whole multiples of 1/2048,
their difference ends at ±16 / 2^FINE(w), and a unit of cost is 4^−FINE(w) / 64. What is rounded is far below what a code loses
(1.0001 times the error). The least costs of every EACH(w)-th number are kept, a kilobyte a number at most, and the way back tries
every way from those to the state that it stands at.

Above that, for a vector with a number beyond EDGE(w), and where the way that was found holds a difference that was cut off, costs
are float32. Which state one came from stands in the lowest w bits of the cost itself, which are of no account beside rounding:
then the least whole number of two float32 patterns tells both.

Operations are single ones in a given order: the compiled loops and those of torch operations, for devices, give the same codes.
"""

import threading
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bslora_convert.bslora.codes.trellis import STATES, WINDOW, reversed_bits
from bslora_convert.process.compiled import compiled

SHORT = 4  # bits up to which costs are whole numbers
FINE = {1: 0, 2: 1, 3: 2, 4: 3}  # by width: how far a difference is shifted up before its square is halved
EDGE = {
    1: 10.0,
    2: 7.0,
    3: 5.5,
    4: 4.5,
}  # a larger number is too far from every value for whole numbers to tell these apart
EACH = {1: 4, 2: 2, 3: 1, 4: 1}
UNIT = 2048  # of x and values, in the numbers that costs are reckoned from
MOST, CAP = (
    1 << 15,
    49151,
)  # a difference stays below the one after its shift, what is kept of a cost is at most the other
OFTEN, SELDOM = 8, 16  # numbers after which costs are brought back to zero, whole ones and those in float32
FAR = 1e30
_rooms = threading.local()


def paths(x: np.ndarray, table: np.ndarray, width: int) -> np.ndarray:
    """(n, L) numbers of about unit variance -> (n, L) uint8 codes as they stand in a file, of least squared error.

    table: (4096,) float32, by window.
    """
    found = table[reversed_bits(WINDOW)]
    codes = np.zeros(x.shape, np.uint8)
    if not x.size:
        return codes
    short = _are_short(x, width)
    if short.any():
        search, places = _compiled(width, True), _places(width)
        values, numbers = _whole(found, x[short], width)
        ordered = np.empty(STATES, np.int16)
        ordered[places] = values
        kept = _room(-(-x.shape[1] // EACH[width]) * (STATES >> width)).reshape(-1, STATES >> width)
        for row, at in zip(numbers, np.flatnonzero(short), strict=True):
            search(row, ordered, places, kept, codes[at])
        short[short] = _are_sure(codes[short], numbers, values, width)
    if not short.all():
        search = _compiled(width, False)
        for at in np.flatnonzero(~short):
            search(np.ascontiguousarray(x[at], dtype=np.float32), found, codes[at])
    return reversed_bits(width).astype(np.uint8)[codes]


def paths_on_device(x: Tensor, table: Tensor, width: int) -> Tensor:
    """The same by torch operations on x's device, all vectors of a kind together."""
    ordered = table[torch.from_numpy(reversed_bits(WINDOW))]
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    if not x.numel():
        return codes
    short = torch.from_numpy(_are_short(x.cpu().numpy(), width))
    if short.any():
        codes[short] = _short_on_device(x[short.to(x.device)], ordered, width).cpu()
        values, numbers = _whole(ordered.numpy(), x[short.to(x.device)].cpu().numpy(), width)
        short[short.clone()] = torch.from_numpy(_are_sure(codes[short].numpy(), numbers, values, width))
    if not short.all():
        codes[~short] = _long_on_device(x[(~short).to(x.device)], ordered, width).cpu()
    return torch.from_numpy(reversed_bits(width).astype(np.uint8)[codes.numpy()])


def _short_on_device(x: Tensor, ordered: Tensor, width: int) -> Tensor:
    (n, length), count, upper = x.shape, 1 << width, STATES >> width
    numbers = torch.arange(count, dtype=torch.int32, device=x.device)[:, None]
    came = torch.empty((length, n, upper), dtype=torch.uint8, device=x.device)
    values, whole = (
        torch.from_numpy(part).to(x.device, torch.int32) for part in _whole(ordered.numpy(), x.cpu().numpy(), width)
    )
    cost = torch.full((n, STATES), CAP, dtype=torch.int32, device=x.device)
    cost[:, 0] = 0
    for i in range(length):
        keys = (cost.view(n, count, upper) * count + numbers).amin(1)
        came[i] = (keys % count).to(torch.uint8)
        best = (keys // count).clamp_max(CAP)
        if i % OFTEN == OFTEN - 1:
            best = best - best.amin(1, keepdim=True)
        away = (whole[:, i : i + 1] - values).clamp(1 - _limit(width), _limit(width) - 1) << FINE[width]
        cost = best.repeat_interleave(count, 1) + (away * away >> 16)
    return _back(cost, came, width)


def _long_on_device(x: Tensor, ordered: Tensor, width: int) -> Tensor:
    (n, length), count, upper = x.shape, 1 << width, STATES >> width
    numbers = torch.arange(count, dtype=torch.int32, device=x.device)[:, None]
    came = torch.empty((length, n, upper), dtype=torch.uint8, device=x.device)
    values = ordered.to(x.device, torch.float32)
    cost = torch.full((n, STATES), FAR, device=x.device)
    cost[:, 0] = 0
    for i in range(length):
        keys = (cost.view(torch.int32).view(n, count, upper) & ~(count - 1)) | numbers
        best = keys.amin(1)
        came[i] = (best & (count - 1)).to(torch.uint8)
        away = x[:, i : i + 1] - values
        cost = best.view(torch.float32).repeat_interleave(count, 1) + away * away
        if i % SELDOM == SELDOM - 1:
            cost = cost - cost.amin(1, keepdim=True)
    return _back(cost, came, width)


def _back(cost: Tensor, came: Tensor, width: int) -> Tensor:
    """The way back from the first of the states of least cost: (n, L) codes. came: (L, n, upper)."""
    count, rows = 1 << width, torch.arange(len(cost), device=cost.device)
    state = (cost == cost.amin(1, keepdim=True)).to(torch.uint8).argmax(1)
    codes = torch.empty((len(cost), len(came)), dtype=torch.uint8, device=cost.device)
    for i in range(len(came) - 1, -1, -1):
        codes[:, i] = (state & (count - 1)).to(torch.uint8)
        held = state >> width
        state = came[i, rows, held].long() << (WINDOW - width) | held
    return codes


def _are_short(x: np.ndarray, width: int) -> np.ndarray:
    """(n,): which vectors whole numbers do for."""
    found: np.ndarray = np.abs(x).max(1, initial=0.0) <= EDGE.get(width, -1.0)
    return found


def _are_sure(codes: np.ndarray, numbers: np.ndarray, values: np.ndarray, width: int) -> np.ndarray:
    """(n,): which ways hold no difference that was cut off. All others are only the dearer without the cut, so it is the best."""
    states = codes.astype(np.int16)
    for back in range(1, -(-WINDOW // width)):
        states[:, back:] |= codes[:, :-back].astype(np.int16) << width * back & STATES - 1
    sure: np.ndarray = (np.abs(numbers.astype(np.int32) - values[states]) < _limit(width) - 1).all(1)
    return sure


def _room(count: int) -> np.ndarray:
    """(count,) uint16 of this thread's room, whatever stands in it: pages that are new cost more than the search does."""
    held: np.ndarray | None = getattr(_rooms, "held", None)
    if held is None or len(held) < count:
        held = _rooms.held = np.empty(count, np.uint16)
    return held[:count]


def _limit(width: int) -> int:
    """What a difference of whole numbers stays below."""
    return MOST >> FINE[width]


def _whole(values: np.ndarray, x: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and numbers as multiples of 1/UNIT, int16; numbers stay so near the values that differences tell these apart."""
    found = np.rint(values * UNIT).astype(np.int16)
    beyond = _limit(width) // 2
    return found, np.clip(np.rint(x * UNIT), found.min() - beyond, found.max() + beyond).astype(np.int16)


@cache
def _compiled(width: int, short: bool) -> Callable[..., None]:
    """The search for one width, in whole numbers or in float32."""
    return compiled(_short(width) if short else _long(width))


def _places(width: int) -> np.ndarray:
    """(4096,): where the cost of each state stands in the loop over whole numbers.

    Those of one newest code stand side by side, so that both halves of the loop run over many neighbours.
    """
    states = np.arange(STATES)
    return (states & ((1 << width) - 1)) * (STATES >> width) + (states >> width)


def _short(width: int) -> Callable[..., None]:
    """Loops are cut so that the compiler makes vector instructions of each; `python benchmarks/trellis.py` times them."""
    count, upper, window, run = 1 << width, STATES >> width, WINDOW, STATES >> 2 * width
    states, cap, fine, edge, every, few = STATES, CAP, FINE[width], _limit(width) - 1, OFTEN, 8
    each = EACH[width]

    def search(x: np.ndarray, table: np.ndarray, places: np.ndarray, kept: np.ndarray, codes: np.ndarray) -> None:
        length = x.shape[0]
        cost, turned = np.empty(states, np.uint16), np.empty(upper, np.uint16)
        for s in range(states):
            cost[s] = cap
        cost[0] = 0
        for i in range(length):
            number, best = x[i], kept[i // each]  # which the next ones write over, up to the last of `each`
            if count <= few:
                for h in range(run):
                    for c in range(count):
                        least = cost[c * upper + h]
                        for p in range(1, count):
                            least = min(least, cost[c * upper + p * run + h])
                        best[h * count + c] = min(least, cap)
            else:
                for c in range(count):
                    for h in range(run):
                        least = cost[c * upper + h]
                        for p in range(1, count):
                            least = min(least, cost[c * upper + p * run + h])
                        turned[c * run + h] = min(least, cap)
                for c in range(count):
                    for h in range(run):
                        best[h * count + c] = turned[c * run + h]
            if i % every == every - 1:
                smallest = best[0]
                for u in range(upper):
                    smallest = min(smallest, best[u])
                for u in range(upper):
                    best[u] -= smallest
            for c in range(count):
                for u in range(upper):
                    away = np.int16(number - table[c * upper + u])
                    away = np.int16(min(max(int(away), -edge), edge) << fine)
                    cost[c * upper + u] = best[u] + np.uint16((np.int32(away) * np.int32(away)) >> 16)
        state = 0
        for s in range(states):
            if cost[places[s]] < cost[places[state]]:
                state = s
        i = length - 1
        while True:
            back = i % each + 1
            for k in range(back):
                codes[i - k] = state >> width * k & (count - 1)
            i -= back
            if i < 0:
                break
            best, nearest, least = kept[i // each], 0, np.int64(1 << 40)
            for way in range(
                1 << width * back
            ):  # the state that comes next on the way back is the first to be told apart
                older, rest = 0, way
                for _ in range(back):
                    older, rest = older << width | rest & (count - 1), rest >> width
                whole = (older << (window - width * back) | state >> width * back) << width * back | state & (
                    (1 << width * back) - 1
                )
                value = np.int64(best[whole >> width * (back + 1)])
                for k in range(back):
                    at = whole >> width * (back - k) & (states - 1)
                    away = np.int16(x[i + k] - table[places[at]])
                    away = np.int16(min(max(int(away), -edge), edge) << fine)
                    value += (np.int32(away) * np.int32(away)) >> 16
                if value < least:
                    least, nearest = value, whole >> width * back
            state = nearest

    return search


def _long(width: int) -> Callable[..., None]:
    """As `_short`, in float32."""
    count, upper, shift = 1 << width, STATES >> width, WINDOW - width
    low, high = np.int32(count - 1), np.int32(~(count - 1))
    states, far, zero, every = STATES, np.float32(FAR), np.float32(0), SELDOM
    block = min(count, 16)

    def search(x: np.ndarray, table: np.ndarray, codes: np.ndarray) -> None:
        length, wide = x.shape[0], table.shape[0] // upper  # count, which the compiler must not unroll
        cost, best = np.empty(states, np.float32), np.empty(upper, np.float32)
        keys, best_keys = cost.view(np.int32), best.view(np.int32)
        came = np.empty((length, upper), np.uint8)
        for s in range(states):
            cost[s] = far
        cost[0] = zero
        for i in range(length):
            number, before = x[i], came[i]
            for u in range(upper):
                best_keys[u] = keys[u] & high
            for first in range(0, count, block):
                for u in range(upper):
                    least = best_keys[u]
                    for p in range(block):
                        least = min(least, (keys[(first + p) * upper + u] & high) | np.int32(first + p))
                    best_keys[u] = least
            for u in range(upper):
                before[u] = np.uint8(best_keys[u] & low)
            for u in range(upper):
                begun = best[u]
                for c in range(wide):
                    away = number - table[u * count + c]
                    cost[u * count + c] = begun + away * away
            if i % every == every - 1:
                smallest = keys[0]
                for s in range(states):
                    smallest = min(smallest, keys[s])
                best_keys[0] = smallest
                begun = best[0]
                for s in range(states):
                    cost[s] = cost[s] - begun
        state = 0
        for s in range(states):
            if cost[s] < cost[state]:
                state = s
        for i in range(length - 1, -1, -1):
            codes[i] = state & (count - 1)
            held = state >> width
            state = (int(came[i, held]) << shift) | held

    return search
