"""Reading vectors of a trellis code one after another, of whatever widths, compiled: for files that are worth it.

window of number i: 12 bits of its width's stream, which end with its own code, less those from before its vector
x̂ = s_g · table[window]

The same numbers, bit for bit, as those that `trellis.values_of` reads of one width all at once, at a hundredth of the work.
"""

from collections.abc import Callable
from functools import cache

import numpy as np

from bslora_convert.bslora.codes.coded import GROUP
from bslora_convert.bslora.codes.trellis import WINDOW
from bslora_convert.process.compiled import compiled

Streams = tuple[np.ndarray, ...]
Walk = Callable[[Streams, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


@cache
def walk() -> Walk:
    """(streams, firsts, widths, lengths, scales, tables, exact, out): the numbers of some vectors into `out`, float32.

    streams: bytes of the codes of 1, 2, … bits. firsts: by width the number of its stream that comes next,
    and at 0 that of `exact`, the numbers of 16 bits in float32. widths, lengths: of the vectors. scales: of their groups.
    """
    group, reach, most = GROUP, WINDOW, 16

    def loop(
        streams: Streams,
        firsts: np.ndarray,
        widths: np.ndarray,
        lengths: np.ndarray,
        scales: np.ndarray,
        tables: np.ndarray,
        exact: np.ndarray,
        out: np.ndarray,
    ) -> None:
        following, at, g = firsts.copy(), 0, 0
        for v in range(len(widths)):
            width, length = int(widths[v]), int(lengths[v])
            if width == most:
                out[at : at + length] = exact[following[0] : following[0] + length]
                following[0] += length
                at += length
                continue
            if width == 0:
                out[at : at + length] = 0
                at += length
                continue
            stream, table, bit = streams[width - 1], tables[width - 1], int(following[width]) * width
            following[width] += length
            mask, window = (1 << width) - 1, 0
            for start in range(0, length, group):
                scale, begun = scales[g], 0
                g += 1
                if start == 0:  # windows that reach back beyond the vector's beginning
                    begun = min((reach - 1) // width, length)
                    for i in range(begun):
                        byte, shift = bit >> 3, bit & 7
                        code = int(stream[byte]) >> shift
                        if shift + width > 8:
                            code |= int(stream[byte + 1]) << (8 - shift)
                        window = (window >> width) | ((code & mask) << (reach - width))
                        out[at + i] = table[window] * scale
                        bit += width
                    bit -= reach - width
                count = min(group, length - start) - begun
                at += begun
                for i in range(count):
                    place = bit + width * i
                    first, skipped = np.uint64(place >> 3), np.uint32(place & 7)
                    bits = np.uint32(stream[first]) | np.uint32(stream[first + np.uint64(1)]) << np.uint32(8)
                    if skipped > np.uint32(4):
                        bits |= np.uint32(stream[first + np.uint64(2)]) << np.uint32(16)
                    out[at + i] = table[(bits >> skipped) & np.uint32((1 << reach) - 1)] * scale
                bit += width * count
                at += count

    return compiled(loop)
