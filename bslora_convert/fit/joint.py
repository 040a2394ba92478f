"""One module of several adapters in bases that they share: truncated Tucker-2 of the stacked updates, in factors.

    T_i = B_i A_i, i = 1 … N                  (out, in), rank r_i                 what adapter i's local part stands for
    ε_i                                                                           squared error that it may have
    both    T_i ≈ U C_i V                     U (out, p), V (q, in), C_i (p, q)   p·out + q·in + Σ p·q numbers
    left    T_i ≈ U A_i                       A_i (p, in)                         p·out + Σ p·in
    right   T_i ≈ B_i V                       B_i (out, q)                        q·in + Σ out·q

    [B_1 … B_N] = Q_b [X_1 … X_N],  [A_1ᵀ … A_Nᵀ] = Q_a [Y_1ᵀ … Y_Nᵀ]            thin QR: all that follows is Σ r_i wide
    U   leading eigenvectors of Σ w_i T_i VᵀV T_iᵀ        V = I at first: the higher-order SVD
    V   leading eigenvectors of Σ w_i T_iᵀ U Uᵀ T_i       then by turns, each with the other held
    w_i = 1 / ε_i                                         errors count by what each adapter may lose

For nested U and V, ‖T_i − U_p C_i V_q‖² = ‖T_i‖² − Σ_{k≤p, l≤q} (Uᵀ T_i V)²_kl, so one cumulative sum of squares gives the error
of every (p, q). The cheapest pair that leaves every adapter within its ε_i is taken; turning the bases can make a smaller pair
do, so both are repeated while that saves. An adapter whose own factors are smaller than a core would be pays for its own factors.

No p below the one whose tail of eigenvalues weighs at most Σ w_i ε_i can do, whatever U is, and likewise for q. Where even these
cost more than separate factors there is nothing to find, and unrelated adapters are let go after two eigenvalue problems.

The same strength. A separate part of least error along T has ⟨T, L⟩ = ‖L‖², an unbiased one (`fit.gain`) ⟨T, L⟩ = ‖T‖². What is
fitted in the bases, L̂, is of least error, γ̂ = ⟨T, L̂⟩ / ‖T‖² = 1 − its error, and is scaled by γ / γ̂ where that is more than one,
γ = ⟨T, L⟩ / ‖T‖². Then its error is 1 − 2γ + γ² / γ̂ of ‖T‖², which must not be more than e = ε / ‖T‖²: before that it may lose
‖T‖² (1 − γ² / (e − 1 + 2γ)).

The same error. Two factors rounded to a dtype of unit roundoff u give a product that is off by about u ‖T‖ however exact the fit
was, and one put together from three is off by no more than 2 u ‖T‖. So an adapter may have the error that it has separately, or
2 u ‖T‖ where that is less. Half of it is kept free for rounding while bases are looked for; what counts is measured after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.bslora.bases import Basis
from bslora_convert.fit.gain import LARGEST, SLIGHT
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import Grams, gram, inner, residual_energy

LEAST = 0.25  # of the error allowed that what is fitted may always have: a scale is four at most
ROUNDINGS = 4  # (2 u)²: two bases, a core and its products with them, which are rarely off by as much as u each
TURNS = 8  # most times that bases are turned


@dataclass(frozen=True, slots=True)
class Target:
    """One adapter's part of a module: factors in float64, ‖T‖², the squared error allowed, numbers of its own local factors.

    along: ⟨T, L⟩ of these. fitted: the squared error allowed before what is fitted is as strong as they are.
    """

    factors: Factors
    energy: float
    allowed: float
    separate: int
    along: float
    fitted: float

    @classmethod
    def of(cls, factors: Factors, local: Factors) -> "Target":
        """What a local part, as stored, was fitted to. factors: (out, R), (R, in). local: (out, r), (r, in)."""
        factors = factors.to(torch.float64)
        grams = Grams.of(factors)
        lost = residual_energy(factors, grams, local)
        energy, along = max(grams.energy, 0.0), inner(factors, local.to(torch.float64))
        allowed = max(lost, ROUNDINGS * rounding(local.b.dtype) * energy)
        least = 2 * along + allowed - energy
        fitted = energy - along**2 / least if least > 0 else allowed
        return cls(factors, energy, allowed, local.parameters, along, min(max(fitted, LEAST * allowed), allowed))

    def scale(self, fitted: Factors) -> float:
        """What makes something of least error as strong along T as the adapter's own factors are; 1 where it is."""
        along = inner(self.factors, fitted.to(torch.float64))
        scale = self.along / along if along > 0 else 1.0
        return min(scale, LARGEST) if scale > 1 + SLIGHT else 1.0


def rounding(dtype: torch.dtype) -> float:
    """Squared unit roundoff."""
    return (torch.finfo(dtype).eps / 2) ** 2


def core_of(target: Target, basis: Basis) -> Tensor:
    """The best core of a target in given bases, by least squares, float64: (p, q), (p, in) or (out, q)."""
    b, a = target.factors.b, target.factors.a
    if basis.left is not None:
        b = torch.linalg.pinv(gram(basis.left), hermitian=True) @ gram(basis.left, b)
    if basis.right is not None:
        a = gram(a.T, basis.right.T) @ torch.linalg.pinv(gram(basis.right.T), hermitian=True)
    return b @ a


def take(target: Target, basis: Basis) -> tuple[Tensor, Factors] | None:
    """The core, in the bases' dtype, and the local part that it gives; None where separate factors are smaller or better."""
    stored = next(side for side in (basis.left, basis.right) if side is not None)
    if _core_numbers(basis, target.factors.shape) >= target.separate:
        return None
    rank, core = basis.sizes_for(target.factors.rank).rank, core_of(target, basis)
    fitted = basis.with_core(core.to(stored.dtype), rank)
    core = (core * target.scale(fitted)).to(stored.dtype)
    if not core.isfinite().all():
        return None
    local = basis.with_core(core, rank)
    if local.rank > target.factors.rank:
        return None  # a server's slot would grow
    lost = residual_energy(target.factors, Grams.of(target.factors), local)
    return (core, local) if lost <= target.allowed else None


def shared_basis(targets: Sequence[Target], dtype: torch.dtype) -> Basis | None:
    """The cheapest bases that hold every target within its error, in `dtype`; None where separate factors are no dearer.

    targets: of one shape, one for each adapter.
    """
    targets = [target for target in targets if target.energy > 0 and target.separate > 0]
    if len(targets) < 2:
        return None
    problem = _Stack.of(targets, dtype)
    found = min(problem.candidates(), key=lambda candidate: candidate[0], default=None)
    return found[1].to(dtype) if found is not None else None


@dataclass(frozen=True, slots=True)
class _Stack:
    """The stacked targets in the coordinates of their spans: outer (out, s_b), inner (in, s_a), and scaled so that ε_i = 1.

    x[i] (s_b, r_i), y[i] (r_i, s_a): T_i / √ε_i = outer x y innerᵀ.
    """

    shape: Shape
    outer: Tensor
    inner: Tensor
    x: Sequence[Tensor]
    y: Sequence[Tensor]
    energies: Tensor
    separate: Tensor

    @classmethod
    def of(cls, targets: Sequence[Target], dtype: torch.dtype) -> "_Stack":
        """Two thin QR decompositions."""
        free = ROUNDINGS / 2 * rounding(dtype)
        allowed = [target.fitted - min(free * target.energy, target.fitted / 2) for target in targets]
        ranks = [target.factors.rank for target in targets]
        scaled = [t.factors.b / epsilon**0.5 for t, epsilon in zip(targets, allowed, strict=True)]
        outer, x = torch.linalg.qr(torch.cat(scaled, dim=1))
        inner, y = torch.linalg.qr(torch.cat([t.factors.a.T for t in targets], dim=1))
        energies = [t.energy / epsilon for t, epsilon in zip(targets, allowed, strict=True)]
        return cls(
            targets[0].factors.shape, outer, inner, x.split(ranks, dim=1), [part.T for part in y.split(ranks, dim=1)],
            torch.tensor(energies, dtype=torch.float64),
            torch.tensor([float(t.separate) for t in targets], dtype=torch.float64),
        )  # fmt: skip

    def candidates(self) -> list[tuple[float, Basis]]:
        """Ways to share that cost less than separate factors: (numbers in all, bases)."""
        out, across = self.shape
        left_values, left = _leading(self._outer_gram(None))
        right_values, right = _leading(self._inner_gram(None))
        least = [_least(values, len(self.x)) for values in (left_values, right_values)]
        found: list[tuple[float, Basis]] = []
        # A basis of one side alone: no smaller one than the least, and often just that.
        p = self._enough(torch.stack([_along(left.T @ x, y) for x, y in zip(self.x, self.y, strict=True)]))
        most = min(x.shape[1] for x in self.x)  # no local part gets a higher rank than its update
        if p <= most and (cost := self._cost(p, p * out, p * across)) < self._whole:
            found.append((cost, Basis(self.outer @ left[:, :p], None)))
        q = self._enough(torch.stack([_along((y @ right).T, x.T) for x, y in zip(self.x, self.y, strict=True)]))
        if q <= most and (cost := self._cost(q, q * across, q * out)) < self._whole:
            found.append((cost, Basis(None, (self.inner @ right[:, :q]).T)))
        if self._cost(1, least[0] * out + least[1] * across, least[0] * least[1]) < self._whole:
            both = self._both(left, right)
            if both is not None:
                found.append(both)
        return found

    def _both(self, left: Tensor, right: Tensor) -> tuple[float, Basis] | None:
        """The cheapest pair of bases, turned for as long as that saves."""
        best: tuple[float, int, int] | None = None
        kept = left, right
        for _ in range(TURNS):
            found = self._cheapest(left, right)
            if found is None or (best is not None and found[0] >= best[0]):
                break
            best, kept = found, (left[:, : found[1]], right[:, : found[2]])
            _, left = _leading(self._outer_gram(kept[1]))
            _, right = _leading(self._inner_gram(left[:, : found[1]]))
        if best is None:
            return None
        return best[0], Basis(self.outer @ kept[0], (self.inner @ kept[1]).T)

    def _cheapest(self, left: Tensor, right: Tensor) -> tuple[float, int, int] | None:
        """(Numbers, p, q) of the cheapest pair that does and costs less than separate factors."""
        out, across = self.shape
        most = [int(min(side.shape[1], self._whole // length)) for side, length in ((left, out), (right, across))]
        if min(most) == 0:
            return None
        p = torch.arange(1, most[0] + 1, dtype=torch.float64)[:, None]
        q = torch.arange(1, most[1] + 1, dtype=torch.float64)
        cost, enough = p * out + q * across, torch.ones(most, dtype=torch.bool)
        for x, y, energy, separate in zip(self.x, self.y, self.energies, self.separate, strict=True):
            held = ((left[:, : most[0]].T @ x) @ (y @ right[:, : most[1]])).square().cumsum(0).cumsum(1)
            enough &= energy - held <= 1
            cost = cost + torch.clamp(p * q, max=float(separate))
        cost = torch.where(enough, cost, torch.inf)
        place = int(cost.argmin())
        numbers = float(cost.flatten()[place])
        return (numbers, place // most[1] + 1, place % most[1] + 1) if numbers < self._whole else None

    def _outer_gram(self, right: Tensor | None) -> Tensor:
        """Σ x y V Vᵀ yᵀ xᵀ, V = `right` (s_a, q), the identity for None: (s_b, s_b)."""
        total = self.outer.new_zeros((self.outer.shape[1],) * 2)
        for x, y in zip(self.x, self.y, strict=True):
            within = y if right is None else y @ right
            total.addmm_(x @ (within @ within.T), x.T)
        return total

    def _inner_gram(self, left: Tensor | None) -> Tensor:
        """Σ yᵀ xᵀ U Uᵀ x y, U = `left` (s_b, p), the identity for None: (s_a, s_a)."""
        total = self.outer.new_zeros((self.inner.shape[1],) * 2)
        for x, y in zip(self.x, self.y, strict=True):
            within = x if left is None else left.T @ x
            total.addmm_(y.T @ (within.T @ within), y)
        return total

    def _enough(self, held: Tensor) -> int:
        """The least number of leading directions that leaves every target at most 1. held: (N, s) energies along each."""
        over = (self.energies[:, None] - held.cumsum(1) > 1).any(0)
        return int(over.sum()) + 1 if not over[-1] else held.shape[1]

    def _cost(self, size: int, bases: float, core: float) -> float:
        """Numbers of bases and cores together; infinite where there is no basis."""
        return bases + float(torch.clamp(self.separate, max=float(core)).sum()) if size else float("inf")

    @property
    def _whole(self) -> float:
        """Numbers of the separate factors."""
        return float(self.separate.sum())


def _leading(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, largest first."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def _along(rows: Tensor, factor: Tensor) -> Tensor:
    """Squared lengths of the rows of rows @ factor: (s, r), (r, n) -> (s,)."""
    return ((rows @ (factor @ factor.T)) * rows).sum(1)


def _least(values: Tensor, allowed: float) -> int:
    """The least number of directions whose tail weighs at most `allowed`."""
    tail = values.flip(0).cumsum(0).flip(0)
    return int((tail > allowed).sum())


def _core_numbers(basis: Basis, shape: Shape) -> int:
    rows, columns = basis.sizes.core(shape)
    return rows * columns
