"""The numbers that PEFT draws A from, generated again on any machine.

    x_0, x_1, …     32-bit outputs of MT19937, seeded by init_genrand(seed mod 2³²)        Matsumoto and Nishimura, 1998
    uniform_(−b, b) torch's on a CPU: one output a float, (x mod 2²⁴) 2⁻²⁴ · 2b − b, in the order of memory
    d_i = (x_i ≫ 8) mod 2¹⁶ − 2¹⁵       the upper 16 of those 24 bits, int16:        uniform ≈ b · d / 2¹⁵

Sixteen bits are within 2⁻¹⁵ b of the float, as near as bfloat16 numbers are to each other, at half of a float's memory; a factor
such as b is left to whoever uses the draws. Whole numbers have no rounding, so that they are the same for every reader.

A seed alone is a stream of 32 bits' worth of state. NumPy's `RandomState` is frozen (NEP 19): its outputs never change.
"""

from dataclasses import dataclass

import numpy as np

AT_ONCE = 1 << 20  # outputs
HALF = 1 << 15
SEEDS = 1 << 32  # seeds that MT19937 tells apart


@dataclass(frozen=True, slots=True)
class Place:
    """Where a module's A₀ (rank, in) stands in a stream: its first draw counts from 0, its rows follow each other."""

    first: int
    rank: int


class Stream:
    """The draws of one seed, in order."""

    def __init__(self, seed: int) -> None:
        self._outputs = np.random.RandomState(seed % SEEDS)

    def take(self, count: int) -> np.ndarray:
        """The next draws: (count,) int16."""
        outputs = self._outputs.randint(0, SEEDS, size=count, dtype=np.uint32)
        return ((outputs >> 8).astype(np.uint16) ^ np.uint16(HALF)).view(np.int16)

    def skip(self, count: int) -> None:
        """Leaves out the next draws."""
        for begin in range(0, count, AT_ONCE):
            self._outputs.randint(0, SEEDS, size=min(AT_ONCE, count - begin), dtype=np.uint32)
