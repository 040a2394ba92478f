"""Whether a module's A is what training made of the draws at a place.

    cosine = ⟨A, d⟩ / (‖A‖ ‖d‖)         1 where A is the draw, whatever its scale; √n · cosine ~ N(0, 1) where it is not

A uniform draw is sub-Gaussian with its own variance, so that chance stays below exp(−t²/2) at t standard deviations for every A,
also one with a few large numbers. The bar of a whole module is 8 of them (10⁻¹⁵ a place; searches look at 10⁹) and 0.3, below
which A₀ is of no use. The first 4096 numbers are looked at before the others, with a lower bar.
"""

from collections.abc import Mapping
from functools import lru_cache
from math import sqrt
from statistics import median

import numpy as np
from torch import Tensor

from bslora_convert.initialisation.drawn import Module
from bslora_convert.initialisation.stream import HALF
from bslora_convert.initialisation.tape import Tape

HEAD = 4096  # numbers of a module that are looked at first
RMS = HALF / 3**0.5  # of draws
LEAST = 0.3  # cosine
DEVIATIONS = 8
FEW = 200  # numbers: modules of fewer begin nothing
AT_ONCE = 1 << 18  # numbers cast to float64 together
LOOKED_AT = 64  # modules whose distribution is looked at


class Heads:
    """The first numbers of modules, as unit vectors."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self.modules = modules
        self.of = lru_cache(maxsize=1024)(self._of)

    def _of(self, name: str) -> np.ndarray | None:
        numbers = first_numbers(self.modules[name].a)
        length = float(np.sqrt(np.square(numbers, dtype=np.float64).sum()))
        return numbers / np.float32(length) if 0 < length < np.inf else None  # not a number is no match either


def first_numbers(a: Tensor) -> np.ndarray:
    """The first numbers of a matrix, float32."""
    rows = -(-HEAD // a.shape[1])
    numbers: np.ndarray = a[:rows].detach().reshape(-1)[:HEAD].cpu().float().numpy()
    return numbers


def centred(draws: np.ndarray) -> np.ndarray:
    """Draws as float32 numbers of mean 0."""
    return draws.astype(np.float32) + np.float32(0.5)


def bar(size: int, deviations: float = DEVIATIONS) -> float:
    """The least cosine of a match of so many numbers."""
    return max(LEAST, deviations / sqrt(size))


def matches(name: str, first: int, heads: Heads, tape: Tape, predicted: bool = False) -> float | None:
    """The cosine of a module with the draws from `first` on, where it is a match.

    predicted: the place is one of few. Only there are modules of few numbers matched.
    """
    module, head = heads.modules[name], heads.of(name)
    if head is None or first < 0 or (module.size < FEW and not predicted):
        return None
    deviations = DEVIATIONS if module.size >= FEW else 6
    draws = centred(tape.read(first, len(head)))
    if not head @ draws >= max(LEAST * 2 / 3, 6 / len(head) ** 0.5) * np.sqrt(draws @ draws):
        return None
    whole = cosine(module.a, first, tape)
    return whole if whole >= bar(module.size, deviations) else None


def cosine(a: Tensor, first: int, tape: Tape) -> float:
    """Of a whole matrix (r, in) with the draws from `first` on; summed in float64. Not a number where A has none."""
    rows = max(AT_ONCE // a.shape[1], 1)
    both = own = drawn = 0.0
    for begin in range(0, a.shape[0], rows):
        numbers = a[begin : begin + rows].detach().reshape(-1).cpu().double().numpy()
        draws = tape.read(first + begin * a.shape[1], len(numbers)) + 0.5
        both, own, drawn = both + float(numbers @ draws), own + float(numbers @ numbers), drawn + float(draws @ draws)
    return both / (own * drawn) ** 0.5 if own > 0 else 0.0


def look_drawn(modules: Mapping[str, Module]) -> bool:
    """Whether most A's still look like a draw: the kurtosis of a uniform distribution, 1.8, and PEFT's width of it."""
    kurtoses, widths = [], []
    for module in list(modules.values())[:: max(len(modules) // LOOKED_AT, 1)]:
        squares = np.square(first_numbers(module.a), dtype=np.float64)
        mean = float(squares.mean())
        if 0 < mean < np.inf:
            kurtoses.append(float(np.square(squares).mean()) / mean**2)
            widths.append((3 * module.width * mean) ** 0.5)
    return bool(kurtoses) and 1.6 <= median(kurtoses) <= 2.6 and 0.5 <= median(widths) <= 2
