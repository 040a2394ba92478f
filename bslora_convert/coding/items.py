"""What each width of a component costs and loses.

A component σ u vᵀ of a module (out, in), D_w the share that w bits a number lose of a normal vector, plainly:

    lost / σ² = 1 − (1 − D_u)(1 − D_v)                                                        left out: 1

Against A's random initialisation, v = t A₀ + r with r ⟂ A₀ (`widths`), ε = ‖r‖² the share of v that training changed. A side
keeps the share k of its vector and adds the noise n:

    plainly      k = 1        n = D_v
    r coded      k = 1        n = (ε + (1 − ε) D_t) D_r / (1 − D_r)    what t̂ A₀ misses is coded too; r is scaled to its own size
    r left out   k = 1 − ε    n = (1 − ε) D_t                          and counts κ ε, not ε, when widths are chosen

    lost / σ² = 1 − k_u k_v + n_u k_v + n_v (k_u − n_u)

The same holds for u against B₀ where training went on from an adapter.

κ: A's change lies in the span of the inputs, as its gradient Bᵀg xᵀ does, so that the module answers to r as if it were √κ times
as long, while the noise of codes points anywhere. Among the components of `smollm2-135m-math-r16` the median of
E(r·x)² in / (‖r‖² E‖x‖²) is 3.6 to 6.2 by kind, that of o_proj 11 (`benchmarks/answers.py`). In a metric of inputs r's own
weighed length says it, and κ is 1.

In a metric noise counts as random directions do there, and the component as it does: D is multiplied by their ratio.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bslora_convert.bslora.codes.coded import bits_of
from bslora_convert.bslora.codes.widths import NONE, WIDTHS
from bslora_convert.coding.allocation import Items
from bslora_convert.coding.encode import SMALLEST_NORM, distortions
from bslora_convert.coding.widths import Side, Widths, options
from bslora_convert.metric.metric import Weigh, as_it_is
from bslora_convert.modules.factors import Shape
from bslora_convert.modules.lowrank import mix_of

KAPPA = 6.0
PLACES = {width: place for place, width in enumerate(WIDTHS)}


@dataclass(frozen=True, slots=True)
class Against:
    """A module's right vectors v against its A₀ (r₀, in), or its left ones against B₀ᵀ (r₀, out).

    rank: r₀. outside: ε of every component, (count,). share: the same in the metric. times: κ.
    """

    rank: int
    outside: np.ndarray
    share: np.ndarray
    times: float

    @classmethod
    def of(cls, vectors: Tensor, base: Tensor, weigh: Weigh = as_it_is) -> "Against":
        """That of vectors (count, n) of any length. base: A₀, or B₀ᵀ. weigh: the metric of their side."""
        rest = vectors - (mix_of(vectors, base) @ base.double()).to(vectors)
        outside = shares(rest, vectors)
        if weigh is as_it_is:
            return cls(len(base), outside, outside, KAPPA)
        return cls(len(base), outside, shares(weigh(rest), weigh(vectors)), 1.0)


def rank_of(against: Against | None) -> int:
    """r₀; 0 where nothing is known."""
    return 0 if against is None else against.rank


def shares(part: Tensor, whole: Tensor) -> np.ndarray:
    """‖part‖² / ‖whole‖² of every row."""
    energy = whole.double().square().sum(1).clamp_min(SMALLEST_NORM)
    found: np.ndarray = (part.double().square().sum(1) / energy).clamp(0, 1).cpu().numpy()
    return found


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of every component under every option, (count, options) each: what is kept, the noise, what is missed beyond."""

    kept: np.ndarray
    noise: np.ndarray
    beyond: np.ndarray

    @classmethod
    def of(
        cls, length: int, widths: Sequence[Side], against: Against | None, noise: np.ndarray, unbiased: bool
    ) -> "_Side":
        """length: of the vectors. widths: of each option. noise: how much more it counts than the component does, (count, 1)."""
        mix, rest = (np.array([PLACES.get(one[part], 0) for one in widths]) for part in (0, 1))
        lost = distortions(length).numpy()[rest]
        plain = np.minimum(lost * noise, 1)
        if against is None:
            return cls(np.ones_like(plain), plain, np.zeros_like(plain))
        mixed, absent = (np.array([(one[part] == NONE) == bool(part) for one in widths]) for part in (0, 1))
        outside, share = against.outside[:, None], against.share[:, None]
        of_mix = (1 - outside) * distortions(against.rank).numpy()[mix]
        of_rest = (outside + of_mix) * (lost / (1 - lost) if unbiased else lost)
        found = np.where(mixed, noise * np.where(absent, of_mix, of_rest), plain)
        missed = np.where(mixed & absent, share, 0.0)
        return cls(1 - missed, found, (against.times - 1) * missed)


def component_items(
    energies: np.ndarray, shape: Shape, against: tuple[Against | None, Against | None] = (None, None),
    noise: tuple[np.ndarray, np.ndarray] | None = None, *, only: int | None = None, needed: bool = False,
    unbiased: bool = True,
) -> Items:  # fmt: skip
    """Options of a module's components, left out first.

    energies: σ², (count,), weighed. against: what is known of B and of A. noise: how much more noise in u and in v counts than
    the component does, (count,) each, in a metric. only: the one width that u and v may have. needed: no component may be left
    out. unbiased: as of `encode.code_rows`.
    """
    count, chosen = len(energies), options(*(side is not None for side in against))
    weights = [np.ones((count, 1))] * 2 if noise is None else [one[:, None] for one in noise]
    u, v = (
        _Side.of(length, [one[side] for one in chosen], against[side], weights[side], unbiased)
        for side, length in enumerate(shape)
    )
    lost = 1 - u.kept * v.kept + u.noise * v.kept + v.noise * (u.kept - u.noise)
    if only is not None:
        lost[:, [only not in (left[1], right[1]) or left[1] != right[1] for left, right in chosen]] = np.inf
    lost = np.column_stack([np.full(count, math.inf) if needed else np.ones(count), lost])
    whole = sum(((side.times - 1) * side.share for side in against if side is not None), np.zeros(count))
    beyond = np.column_stack([whole, u.beyond + v.beyond])
    ranks = [rank_of(side) for side in against]
    bits = np.array([0.0, *(_bits(one, shape, ranks) for one in chosen)])
    energies = energies[:, None]
    return Items(np.broadcast_to(bits, lost.shape), energies * (lost + beyond), energies * lost)


def _bits(widths: Widths, shape: Shape, ranks: Sequence[int]) -> float:
    """Bits of one component. ranks: r₀ of B₀ and A₀, 0 where a side is stored against nothing."""
    return float(
        sum(
            bits_of(length, rest) + (bits_of(rank, mix) if rank else 0)
            for (mix, rest), length, rank in zip(widths, shape, ranks, strict=True)
        )
    )
