"""What each width of a component costs and loses.

A component σ u vᵀ of a module (out, in), D_w the share that w bits a number lose of a normal vector, plainly:

    lost / σ² = 1 − (1 − D_u)(1 − D_v)                                                        left out: 1

Against A's random initialisation, v = t A₀ + r with r ⟂ A₀ (`widths`), ε = ‖r‖² the share of v that training changed:

    lost / σ² = 1 − k + D_u k + (1 − D_u) n
    r coded      k = 1        n = (ε + (1 − ε) D_t) D_r / (1 − D_r)    what t̂ A₀ misses is coded too; r is scaled to its own size
    r left out   k = 1 − ε    n = (1 − ε) D_t                          and counts κ ε, not ε, when widths are chosen

κ: A's change lies in the span of the inputs, as its gradient Bᵀg xᵀ does, so that the module answers to r as if it were √κ times
as long, while the noise of codes points anywhere. Among the components of `smollm2-135m-math-r16` the median of
E(r·x)² in / (‖r‖² E‖x‖²) is 4 to 6, that of o_proj 11. In a metric of inputs r's own weighed length says it, and κ is 1.

In a metric noise counts as random directions do there, and the component as it does: D is multiplied by their ratio.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bslora_convert.bslora.codes.coded import bits_of
from bslora_convert.bslora.codes.widths import NONE, WIDTHS
from bslora_convert.coding.allocation import Items
from bslora_convert.coding.encode import SMALLEST_NORM, distortions
from bslora_convert.coding.widths import Widths, options
from bslora_convert.metric.metric import Weigh, as_it_is
from bslora_convert.modules.factors import Shape

KAPPA = 4.0
PLACES = {width: place for place, width in enumerate(WIDTHS)}


@dataclass(frozen=True, slots=True)
class Against:
    """A module's right vectors v against its A₀ (r₀, in).

    rank: r₀. outside: ε of every component, (count,). share: the same in the metric. times: κ.
    """

    rank: int
    outside: np.ndarray
    share: np.ndarray
    times: float

    @classmethod
    def of(cls, vectors: Tensor, base: Tensor, weigh: Weigh = as_it_is) -> "Against":
        """That of vectors (count, in) of any length. base: A₀. weigh: the metric of inputs."""
        along = base.double()
        mix = torch.linalg.solve(along @ along.T, along @ vectors.double().T).T
        rest = vectors - (mix @ along).to(vectors)
        outside = _shares(rest, vectors)
        if weigh is as_it_is:
            return cls(len(base), outside, outside, KAPPA)
        return cls(len(base), outside, _shares(weigh(rest), weigh(vectors)), 1.0)


def _shares(part: Tensor, whole: Tensor) -> np.ndarray:
    """‖part‖² / ‖whole‖² of every row."""
    energy = whole.double().square().sum(1).clamp_min(SMALLEST_NORM)
    found: np.ndarray = (part.double().square().sum(1) / energy).clamp(0, 1).cpu().numpy()
    return found


def component_items(
    energies: np.ndarray, shape: Shape, against: Against | None = None,
    noise: tuple[np.ndarray, np.ndarray] | None = None, *, only: int | None = None, needed: bool = False,
    unbiased: bool = True,
) -> Items:  # fmt: skip
    """Options of a module's components, left out first.

    energies: σ², (count,), weighed. against: A's random initialisation, where it is known. noise: how much more noise in u and in
    v counts than the component does, (count,) each, in a metric. only: the one width that u and v may have. needed: no component
    may be left out. unbiased: as of `encode.code_rows`.
    """
    count, chosen, drawn = len(energies), options(against is not None), 0 if against is None else against.rank
    u, t, v = (np.array([PLACES.get(one[side], 0) for one in chosen]) for side in range(3))
    d_u, d_v = (distortions(side).numpy() for side in shape)
    on_u, on_v = (np.ones((count, 1)),) * 2 if noise is None else (one[:, None] for one in noise)
    lost_u, lost_v = np.minimum(d_u[u] * on_u, 1), np.minimum(d_v[v] * on_v, 1)
    missed, whole = np.zeros((count, len(chosen))), np.zeros(count)  # 1 − k, and what it counts beyond itself
    if against is not None:
        mixed = np.array([mix != NONE for _, mix, _ in chosen])
        absent = np.array([rest == NONE for _, _, rest in chosen])
        outside, missed = against.outside[:, None], np.where(absent, against.share[:, None], 0.0)
        d_r, of_mix = d_v[v] / (1 - d_v[v]) if unbiased else d_v[v], (1 - outside) * distortions(drawn).numpy()[t]
        lost_v = np.where(mixed, on_v * np.where(absent, of_mix, (outside + of_mix) * d_r), lost_v)
        whole = (against.times - 1) * against.share
    lost = missed + lost_u * (1 - missed) + (1 - lost_u) * lost_v
    if only is not None:
        lost[:, [one[0] != only or one[2] != only for one in chosen]] = np.inf
    lost = np.column_stack([np.full(count, math.inf) if needed else np.ones(count), lost])
    beyond = np.column_stack([whole, missed * (0 if against is None else against.times - 1)])
    bits = np.array([0.0, *(_bits(one, shape, drawn) for one in chosen)])
    energies = energies[:, None]
    return Items(np.broadcast_to(bits, lost.shape), energies * (lost + beyond), energies * lost)


def _bits(widths: Widths, shape: Shape, drawn: int) -> float:
    """Bits of one component; drawn: r₀, 0 where nothing is stored against draws."""
    (column, mix, row), (out, width) = widths, shape
    return float(bits_of(out, column) + bits_of(width, row) + (bits_of(drawn, mix) if drawn else 0))
