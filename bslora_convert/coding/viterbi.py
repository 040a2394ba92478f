"""Viterbi's search for the best codes of the trellis (`bslora.codes.trellis`): exact, and the same on every machine.

    state s: the last 12 bits, the newest lowest        s' = (s ≪ w | c) mod 4096
    cost(s') = min over the 2^w states before it of cost(s)  +  (x − value(s'))²

All successors of a state share its upper bits, so that the least of 2^w costs is taken once for 2^w states. Which it came from
stands in the lowest w bits of the cost itself, which are of no account beside rounding: then the least whole number of two
float32 patterns tells both. Operations are single ones of IEEE arithmetic in a given order: the compiled loop and that of torch
operations, for devices, give the same codes.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from bslora_convert.bslora.codes.trellis import STATES, WINDOW, reversed_bits
from bslora_convert.process.compiled import compiled

FAR = 1e30
APART = 4  # bits up to which states of one newest code stand side by side
EVERY = 16  # numbers after which costs are brought back to zero


def paths(x: np.ndarray, table: np.ndarray, width: int) -> np.ndarray:
    """(n, L) numbers of about unit variance -> (n, L) uint8 codes as they stand in a file, of least squared error.

    table: (4096,) float32, by window.
    """
    search, places = _compiled(width), _places(width)
    ordered = np.empty(STATES, np.float32)
    ordered[places] = table[reversed_bits(WINDOW)]
    codes = np.empty(x.shape, np.uint8)
    for row, out in zip(np.ascontiguousarray(x, dtype=np.float32), codes, strict=True):
        search(row, ordered, places, out)
    return reversed_bits(width).astype(np.uint8)[codes]


def paths_on_device(x: Tensor, table: Tensor, width: int) -> Tensor:
    """The same by torch operations on x's device, all vectors together."""
    (n, length), count, upper = x.shape, 1 << width, STATES >> width
    ordered = table[torch.from_numpy(reversed_bits(WINDOW))].to(x.device, torch.float32)
    cost = torch.full((n, STATES), FAR, device=x.device)
    cost[:, 0] = 0
    numbers = torch.arange(count, dtype=torch.int32, device=x.device)[:, None]
    came = torch.empty((length, n, upper), dtype=torch.uint8, device=x.device)
    for i in range(length):
        keys = (cost.view(torch.int32).view(n, count, upper) & ~(count - 1)) | numbers
        best = keys.amin(1)
        came[i] = (best & (count - 1)).to(torch.uint8)
        away = x[:, i : i + 1] - ordered
        cost = best.view(torch.float32).repeat_interleave(count, 1) + away * away
        if i % EVERY == EVERY - 1:
            cost = cost - cost.amin(1, keepdim=True)
    state = cost.argmin(1)
    codes = torch.empty((n, length), dtype=torch.uint8, device=x.device)
    rows = torch.arange(n, device=x.device)
    for i in range(length - 1, -1, -1):
        codes[:, i] = (state & (count - 1)).to(torch.uint8)
        held = state >> width
        state = came[i, rows, held].long() << (WINDOW - width) | held
    return torch.from_numpy(reversed_bits(width).astype(np.uint8)[codes.cpu().numpy()])


@cache
def _compiled(width: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]:
    """The search for one width."""
    return compiled(_search(width))


def _places(width: int) -> np.ndarray:
    """(4096,): where the cost of each state stands in the compiled loop.

    Those of one newest code stand side by side where codes are few, so that both of its loops run over many neighbours.
    """
    states = np.arange(STATES)
    if width > APART:
        return states
    return (states & ((1 << width) - 1)) * (STATES >> width) + (states >> width)


def _search(width: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]:
    """Loops are cut so that the compiler makes vector instructions of each; `python benchmarks/trellis.py` times them."""
    count, upper, shift, run = 1 << width, STATES >> width, WINDOW - width, STATES >> 2 * width
    low, high = np.int32(count - 1), np.int32(~(count - 1))
    states, far, zero, every, apart, few = STATES, np.float32(FAR), np.float32(0), EVERY, width <= APART, 4
    block = min(count, 16)

    def search(x: np.ndarray, table: np.ndarray, places: np.ndarray, codes: np.ndarray) -> None:
        length, wide = x.shape[0], table.shape[0] // upper  # count, which the compiler must not unroll
        cost, best, turned = np.empty(states, np.float32), np.empty(upper, np.float32), np.empty(upper, np.int32)
        keys, best_keys = cost.view(np.int32), best.view(np.int32)
        came = np.empty((length, upper), np.uint8)
        for s in range(states):
            cost[s] = far
        cost[0] = zero
        for i in range(length):
            number, before = x[i], came[i]
            if apart and count <= few:
                for h in range(run):
                    for c in range(count):
                        least = keys[c * upper + h] & high
                        for p in range(1, count):
                            least = min(least, (keys[c * upper + p * run + h] & high) | np.int32(p))
                        best_keys[h * count + c] = least
            elif apart:
                for c in range(count):
                    for h in range(run):
                        least = keys[c * upper + h] & high
                        for p in range(1, count):
                            least = min(least, (keys[c * upper + p * run + h] & high) | np.int32(p))
                        turned[c * run + h] = least
                for c in range(count):
                    for h in range(run):
                        best_keys[h * count + c] = turned[c * run + h]
            else:
                for u in range(upper):
                    best_keys[u] = keys[u] & high
                for first in range(0, count, block):
                    for u in range(upper):
                        least = best_keys[u]
                        for p in range(block):
                            least = min(least, (keys[(first + p) * upper + u] & high) | np.int32(first + p))
                        best_keys[u] = least
            if apart:
                for c in range(count):
                    for u in range(upper):
                        away = number - table[c * upper + u]
                        cost[c * upper + u] = best[u] + away * away
            else:
                for u in range(upper):
                    begun = best[u]
                    for c in range(wide):
                        away = number - table[u * count + c]
                        cost[u * count + c] = begun + away * away
            for u in range(upper):
                before[u] = np.uint8(best_keys[u] & low)
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
            if cost[places[s]] < cost[places[state]]:
                state = s
        for i in range(length - 1, -1, -1):
            codes[i] = state & (count - 1)
            held = state >> width
            state = (int(came[i, held]) << shift) | held

    return search
