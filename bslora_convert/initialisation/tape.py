"""The draws of one seed at any position, in bounded memory: blocks made again from the generator's state before them."""

from collections import OrderedDict
from copy import deepcopy

import numpy as np

from bslora_convert.initialisation.stream import Stream

BLOCK = 1 << 20  # draws: two megabytes, a few milliseconds
KEPT = 48  # blocks


class Tape:
    """A stream that can be read again and elsewhere."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._states = [Stream(seed)]  # before each block
        self._blocks: OrderedDict[int, np.ndarray] = OrderedDict()

    def read(self, first: int, count: int) -> np.ndarray:
        """Draws from `first` on: (count,) int16, not to be written to."""
        pieces = []
        while count > 0:
            number, begin = divmod(first, BLOCK)
            pieces.append(self._block(number)[begin : begin + count])
            first, count = first + len(pieces[-1]), count - len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces or [np.empty(0, np.int16)])

    def _block(self, number: int) -> np.ndarray:
        while number not in self._blocks:
            self._make(min(number, len(self._states) - 1))
        self._blocks.move_to_end(number)
        return self._blocks[number]

    def _make(self, number: int) -> None:
        stream = deepcopy(self._states[number])
        self._blocks[number] = stream.take(BLOCK)
        self._blocks.move_to_end(number)
        if number == len(self._states) - 1:
            self._states.append(stream)
        if len(self._blocks) > KEPT:
            self._blocks.popitem(last=False)
