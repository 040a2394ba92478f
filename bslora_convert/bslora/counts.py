"""Stored numbers of a BSLoRA form before it exists (section A.4 of the paper, as the authors' code counts).

With S the sum of (out + in) over modules, L layers, r_l, r_a, r_e the local, intra and inter ranks and s the shared size:

    local   r_l S        slice   (L r_a + r_e)(S_out + S_in)        gate  2 s (L r_a + r_e) + 2 Σ (out + in + 2 s)
                         KE      2 s (L r_a + r_e) + 2 Σ (out/s + in/s)
"""

from collections.abc import Iterable
from math import prod

from bslora_convert.bslora.transforms import Transform
from bslora_convert.modules.factors import Shape


def local_parameters(shapes: Iterable[Shape], rank: int) -> int:
    """Stored numbers of local factors of one rank."""
    return sum(rank * (out + width) for out, width in shapes)


def pair_parameters(transform: Transform, rank: int) -> int:
    """Stored numbers of one shared pair."""
    return rank * sum(transform.pair_sizes)


def own_parameters(transform: Transform, shape: Shape, kernel_rank: int = 1) -> int:
    """Stored numbers that one module keeps for one shared path."""
    return sum(prod(s) for s in transform.own_shapes(shape, kernel_rank).values())
