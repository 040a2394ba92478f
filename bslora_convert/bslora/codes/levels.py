"""The values that codes of the first version stand for, before their group's scale.

Widths from 1 to 4 have the levels of least squared error for a normal distribution of unit variance (Max, 1960, table I): the
numbers of a singular vector are close to normal. Eight bits have equal steps up to LARGEST, where a step's length matters more
than where it lies. Levels are symmetric, so a sign costs one bit and no code stands for zero.
"""

import torch
from torch import Tensor

LARGEST = 4.0

_POSITIVE = {
    1: (0.7979,),
    2: (0.4528, 1.510),
    3: (0.2451, 0.7560, 1.344, 2.152),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
}


def _symmetric(positive: tuple[float, ...]) -> Tensor:
    return torch.tensor([*(-value for value in reversed(positive)), *positive], dtype=torch.float32)


LEVELS: dict[int, Tensor] = {
    **{width: _symmetric(positive) for width, positive in _POSITIVE.items()},
    8: (torch.arange(256, dtype=torch.float32) - 127.5) * (LARGEST / 127.5),
}
