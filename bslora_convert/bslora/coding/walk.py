"""Reading a trellis code number after number, compiled: for files that are worth it.

window' = window ≫ w | code ≪ (12 − w)        x̂ = s_g · table[window]

The same numbers, bit for bit, as those that `trellis.values_of` reads all at once, at a hundredth of the work.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from bslora_convert.bslora.coding.coded import GROUP
from bslora_convert.bslora.coding.trellis import WINDOW
from bslora_convert.process.compiled import compiled

Walk = Callable[[np.ndarray, int, int, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


@cache
def walk() -> Walk:
    """(stream, width, first, lengths, scales, table, out): the numbers of some vectors into `out`, float32.

    first: the number of the width's stream with which the first vector begins. lengths, scales: of the vectors and their groups.
    """
    group, reach = GROUP, WINDOW

    def loop(
        stream: np.ndarray,
        width: int,
        first: int,
        lengths: np.ndarray,
        scales: np.ndarray,
        table: np.ndarray,
        out: np.ndarray,
    ) -> None:
        mask, bit, at, g = (1 << width) - 1, first * width, 0, 0
        for length in lengths:
            window = 0
            for start in range(0, length, group):
                scale = scales[g]
                g += 1
                for _ in range(start, min(start + group, length)):
                    byte, shift = bit >> 3, bit & 7
                    code = int(stream[byte]) >> shift
                    if shift + width > 8:
                        code |= int(stream[byte + 1]) << (8 - shift)
                    window = (window >> width) | ((code & mask) << (reach - width))
                    out[at] = table[window] * scale
                    at += 1
                    bit += width

    return compiled(loop)
