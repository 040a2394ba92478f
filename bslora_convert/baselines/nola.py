"""NOLA (arXiv 2310.02556): both factors are mixtures of random matrices that a seed makes again; only coefficients are stored.

    A_m = Σ_i α_mi X_i    X_i (r, in), i = 1 … k        B_m = Σ_j β_mj Y_j    Y_j (out, r), j = 1 … k
    ΔW_m = B_m A_m                                      Σ_m min(k, r in) + min(k, r out) numbers

r · in matrices span all factors (r, in), so no more are drawn than that; with as many on both sides the form is LoRA of rank r.
The paper's use for it is below that, down to less than rank one. Modules whose sides are as long have the same random matrices,
normal, of variance 1 / (r · side), from a CPU generator for each length, one matrix after the other, so that fewer are the first
of more.

The fit alternates exact least squares for α and β of each module by itself, for ΔW = P Q with P (out, R), Q (R, in). Random
matrices that nearly span a space are badly conditioned: coefficients grow, and so does what their rounding costs. With ε² the
mean square relative error of the storage dtype's rounding, the expected cost is counted in the objective:

    ‖ΔW − BA‖² + ε² Σ_j β_j² ‖Y_j A‖² + ε² Σ_i α_i² ‖B X_i‖²

With X_it row t of X_i, S_ts (k, k) of the ⟨X_it, X_js⟩, made once for all modules, and C = BᵀB + ε² Σ_j β_j² Y_jᵀY_j:

    (Σ_ts C_ts S_ts + ε² diag of the same of BᵀB) α = (⟨X_i, BᵀP Q⟩)_i            one k×k system; β likewise, transposed

float64, and solved for the change, so no step raises the objective. The problem has local optima. Two starts run for a few sweeps
and the better goes on:

    svd        α nearest to the truncated SVD's A
    spectral   α the leading right singular vector of (⟨Y_j X_i, ΔW⟩)_ji: where there are few coefficients for many entries, the
               products Y_j X_i are nearly orthogonal and ΔW's coefficients in them are β αᵀ

k is the largest that fits, up to 512: the systems are k×k, 210 modules take about two minutes with 512 on two busy cores, and a
budget that would buy more is left unspent. Ranks 1 and 2 are tried, each with the k that it leaves, and what loses
least over all modules is taken: for the same k a lower rank has more of its factors within reach.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.baselines.baseline import Fitted, largest, rounded
from bslora_convert.baselines.proximal import toward_optimum
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import Grams

MOST_MATRICES = 512
RANKS = (1, 2)
TRIAL_SWEEPS = 2  # of each start
SWEEPS = 12
TOLERANCE = 3e-3  # share of the objective that a sweep must take off it to be followed by another
FLOOR = 1e-13  # of the energy: below it the objective is rounding
POWER_STEPS = 12


@dataclass(frozen=True, slots=True)
class Random:
    """The random matrices of one length of side: matrices (k, r, side), and inner (r, r, k, k), S; float64."""

    matrices: Tensor
    inner: Tensor

    @classmethod
    def of(cls, side: int, rank: int, most: int, seed: int) -> "Random":
        """The first `most` of this seed, or as many as span everything."""
        generator = torch.Generator("cpu").manual_seed(seed + side)
        shape = (min(most, rank * side), rank, side)
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32).double() / math.sqrt(rank * side)
        rows = drawn.transpose(0, 1)
        return cls(drawn, torch.stack([torch.stack([one @ other.T for other in rows]) for one in rows]))

    def to(self, device: torch.device) -> "Random":
        """The same on another device."""
        return Random(self.matrices.to(device), self.inner.to(device))

    def mixed(self, coefficients: Tensor) -> Tensor:
        """(k,) -> (r, side)."""
        return torch.einsum("k,kts->ts", coefficients, self.matrices)

    def against(self, factor: Tensor) -> Tensor:
        """The inner product of each with a factor: (r, side) -> (k,)."""
        return self.matrices.flatten(1) @ factor.flatten()

    def normal(self, gram: Tensor) -> Tensor:
        """Σ_ts gram_ts S_ts: (r, r) -> (k, k)."""
        return torch.einsum("ts,tskl->kl", gram, self.inner)

    def normal_diagonal(self, gram: Tensor) -> Tensor:
        """The diagonal of `normal`: (k,)."""
        return torch.einsum("ts,tsk->k", gram, self.inner.diagonal(dim1=2, dim2=3))

    def noisy(self, coefficients: Tensor, noise: float) -> tuple[Tensor, Tensor]:
        """M Mᵀ of the mixture M (r, side), and what is expected of it where coefficients err by `noise`: (r, r) each."""
        mixed = self.mixed(coefficients)
        own = self.inner.diagonal(dim1=2, dim2=3) @ coefficients.square()
        gram = mixed @ mixed.T
        return gram, gram + noise * own

    def nearest(self, factor: Tensor) -> Tensor:
        """Coefficients of the mixture that is nearest to a factor (r, side): (k,)."""
        rank = len(self.inner)
        identity = torch.eye(rank, dtype=factor.dtype, device=factor.device)
        right = self.against(factor)[:, None]
        return toward_optimum(self.normal(identity), right, torch.zeros_like(right))[:, 0]


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What one module stores: β (min(k, r out),), α (min(k, r in),)."""

    b: Tensor
    a: Tensor

    def balanced(self) -> "Coefficients":
        """The same update, both as long."""
        b, a = float(self.b.norm()), float(self.a.norm())
        ratio = math.sqrt(b / a) if b > 0 and a > 0 else 1.0
        return Coefficients(self.b / ratio, self.a * ratio)

    def stored(self, storage: torch.dtype) -> "Coefficients":
        """As they come back from a file."""
        return Coefficients(rounded(self.b, storage), rounded(self.a, storage))

    def delta(self, of_b: Random, of_a: Random) -> Factors:
        """The module's update, float32: (out, r), (r, in)."""
        return Factors(of_b.mixed(self.b.double()).T, of_a.mixed(self.a.double())).to(torch.float32)


def fit_nola(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """Coefficients of every module for the random matrices of this seed.

    :raises OutOfReach: when one matrix a side is more than the budget.
    """
    found = [_fitted(source, budget, rank, storage, seed) for rank in RANKS]
    return min(found, key=lambda one: one[0])[1]


def _fitted(source: Source, budget: int, rank: int, storage: torch.dtype, seed: int) -> tuple[float, Fitted]:
    """What one rank loses, and gives."""
    shapes = source.shapes
    device = next(iter(source.deltas.values())).stored.b.device
    most = largest(lambda k: nola_parameters(shapes, rank, k), budget, MOST_MATRICES, "NOLA")
    noise = rounding(storage)
    random = {side: Random.of(side, rank, most, seed).to(device) for shape in shapes.values() for side in set(shape)}

    def fitted(name: str) -> tuple[Factors, float]:
        of_b, of_a = (random[side] for side in shapes[name])
        target = source.deltas[name].factors()
        found, history = fit_coefficients(target, source.svds[name].truncate([target], rank), of_b, of_a, noise)
        return found.balanced().stored(storage).delta(of_b, of_a), history[-1]

    found = dict(zip(shapes, each(fitted, shapes), strict=True))
    deltas = {name: delta for name, (delta, _) in found.items()}
    settings = {"rank": rank, "matrices": most, "seed": seed}
    return sum(lost for _, lost in found.values()), Fitted(deltas, nola_parameters(shapes, rank, most), settings)


def nola_parameters(shapes: Mapping[str, Shape], rank: int, matrices: int) -> int:
    """Numbers that NOLA stores."""
    return sum(min(matrices, rank * side) for shape in shapes.values() for side in shape)


def fit_coefficients(
    target: Factors, svd: Factors, of_b: Random, of_a: Random, noise: float = 0.0
) -> tuple[Coefficients, list[float]]:
    """β and α of one module, float64, and the objective after each of its sweeps (module docstring).

    target: (out, R), (R, in). svd: the truncated SVD of it, of rank r or less. noise: ε².
    """
    target, svd = target.to(torch.float64), svd.to(torch.float64).padded(len(of_a.inner))
    energy = Grams.of(target).energy
    beta = svd.b.new_zeros(len(of_b.matrices))
    starts = [Coefficients(beta, alpha) for alpha in (of_a.nearest(svd.a), _leading(target, of_b, of_a))]
    trials = [_run(target, energy, start, of_b, of_a, noise, TRIAL_SWEEPS) for start in starts]
    found, history = min(trials, key=lambda trial: trial[1][-1])
    found, further = _run(target, energy, found, of_b, of_a, noise, SWEEPS - TRIAL_SWEEPS)
    return found, history + further


def rounding(storage: torch.dtype) -> float:
    """ε²: the mean square of a number's relative error in this dtype, mantissas as likely as they are in nature."""
    return torch.finfo(storage).eps ** 2 / 24


def _run(
    target: Factors, energy: float, held: Coefficients, of_b: Random, of_a: Random, noise: float, sweeps: int
) -> tuple[Coefficients, list[float]]:
    """Sweeps of β, then α, each at its optimum given the other, until one gains too little; the objective after each."""
    beta, alpha = held.b, held.a
    history: list[float] = []

    def system(mine: Random, gram: Tensor, expected: Tensor) -> Tensor:
        normal = mine.normal(expected)
        normal.diagonal().add_(noise * mine.normal_diagonal(gram))
        return normal

    for _ in range(sweeps):
        a = of_a.mixed(alpha)
        normal, right = system(of_b, *of_a.noisy(alpha, noise)), of_b.against((a @ target.a.T) @ target.b.T)
        beta = toward_optimum(normal, right[:, None], beta[:, None])[:, 0]
        b = of_b.mixed(beta)
        normal, right = system(of_a, *of_b.noisy(beta, noise)), of_a.against((b @ target.b) @ target.a)
        alpha = toward_optimum(normal, right[:, None], alpha[:, None])[:, 0]
        history.append(max(energy - float(2 * right @ alpha - alpha @ normal @ alpha), 0.0))
        lost = history[-1]
        if lost <= FLOOR * energy or (len(history) > 1 and history[-2] - lost < TOLERANCE * lost):
            break
    return Coefficients(beta, alpha), history


def _leading(target: Factors, of_b: Random, of_a: Random) -> Tensor:
    """The leading right singular vector of (⟨Y_j X_i, ΔW⟩)_ji, by power steps from the longest row: (k,)."""
    left = (of_b.matrices @ target.b).flatten(1)  # (k, r R)
    right = (of_a.matrices @ target.a.T).flatten(1)
    products = left @ right.T
    alpha = products[products.square().sum(1).argmax()]
    for _ in range(POWER_STEPS):
        alpha = alpha / alpha.norm().clamp_min(torch.finfo(alpha.dtype).tiny)
        alpha = products.T @ (products @ alpha)
    unit: Tensor = alpha / alpha.norm().clamp_min(torch.finfo(alpha.dtype).tiny)
    return unit
