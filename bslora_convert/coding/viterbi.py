"""Viterbi's search for the best codes of the trellis (`bslora.coding.trellis`): exact, and the same on every machine.

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

from bslora_convert.bslora.coding.trellis import STATES, WINDOW, reversed_bits
from bslora_convert.process.compiled import compiled

FAR = 1e30
EVERY = 16  # numbers after which costs are brought back to zero


def paths(x: np.ndarray, table: np.ndarray, width: int) -> np.ndarray:
    """(n, L) numbers of about unit variance -> (n, L) uint8 codes as they stand in a file, of least squared error.

    table: (4096,) float32, by window.
    """
    search = _compiled(width)
    ordered = np.ascontiguousarray(table[reversed_bits(np.arange(STATES), WINDOW)])
    codes = np.empty(x.shape, np.uint8)
    for row, out in zip(np.ascontiguousarray(x, dtype=np.float32), codes, strict=True):
        search(row, ordered, out)
    return reversed_bits(codes, width)


def paths_on_device(x: Tensor, table: Tensor, width: int) -> Tensor:
    """The same by torch operations on x's device, all vectors together."""
    (n, length), count, upper = x.shape, 1 << width, STATES >> width
    order = torch.from_numpy(reversed_bits(np.arange(STATES), WINDOW))
    ordered = table[order].to(x.device, torch.float32)
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
    return torch.from_numpy(reversed_bits(codes.cpu().numpy(), width))


@cache
def _compiled(width: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    """The search for one width."""
    return compiled(_search(width))


def _search(width: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
    count, upper, shift = 1 << width, STATES >> width, WINDOW - width
    low, high = np.int32(count - 1), np.int32(~(count - 1))
    states, far, zero, every = STATES, np.float32(FAR), np.float32(0), EVERY

    def search(x: np.ndarray, table: np.ndarray, codes: np.ndarray) -> None:
        length = x.shape[0]
        cost = np.empty(states, np.float32)
        best = np.empty(upper, np.float32)
        keys, best_keys = cost.view(np.int32), best.view(np.int32)
        came = np.empty((length, upper), np.uint8)
        for s in range(states):
            cost[s] = far
        cost[0] = zero
        for i in range(length):
            number, before = x[i], came[i]
            for u in range(upper):
                best_keys[u] = keys[u] & high
            for p in range(1, count):
                row = keys[p * upper : (p + 1) * upper]
                for u in range(upper):
                    best_keys[u] = min(best_keys[u], (row[u] & high) | np.int32(p))
            for u in range(upper):
                before[u] = np.uint8(best_keys[u] & low)
            if count < 8:  # short runs are unrolled whole, longer ones go by vector instructions
                for u in range(upper):
                    least = best[u]
                    for j in range(count):
                        away = number - table[u * count + j]
                        cost[u * count + j] = least + away * away
            else:
                for u in range(upper):
                    least = best[u]
                    out, values = cost[u * count : (u + 1) * count], table[u * count : (u + 1) * count]
                    for j in range(count):
                        away = number - values[j]
                        out[j] = least + away * away
            if i % every == every - 1:
                smallest = keys[0]
                for s in range(states):
                    smallest = min(smallest, keys[s])
                least = cost[0]
                for s in range(states):
                    if keys[s] == smallest:
                        least = cost[s]
                for s in range(states):
                    cost[s] = cost[s] - least
        state = 0
        for s in range(states):
            if cost[s] < cost[state]:
                state = s
        for i in range(length - 1, -1, -1):
            codes[i] = state & (count - 1)
            held = state >> width
            state = (int(came[i, held]) << shift) | held

    return search
