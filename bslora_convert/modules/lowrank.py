"""Truncated SVD of a product of thin factors, through Gram matrices.

    ΔW = B A,  B (out, r), A (r, in)                        never formed
    A Aᵀ = L Lᵀ                                             Cholesky, r×r        A = L Qᵀ, Q orthonormal
    H = Lᵀ (BᵀB) L = W diag(σ²) Wᵀ                          eigenvalues, r×r      B L = U diag(σ) Wᵀ
    ΔW = (B L W)(Wᵀ L⁻¹ A)                                  = U diag(σ) Vᵀ
    best rank-k part                                        the first k columns and rows of these

Everything but the two Gram matrices and the final thin products is r×r. Truncation projects with W Wᵀ, so an inexact
eigenvector costs accuracy only to second order. Gram matrices are float64. The rows of A are brought to unit length
first (B takes the lengths), which removes a diagonal change of gauge; where A's rows are dependent, L comes from
eigenvectors of A Aᵀ instead, null directions left out.

Numerical rank. The factors' numbers are results of float32 arithmetic: each is off by a few unit roundoffs u = 2⁻²⁴ of its size,
and the product by a matrix whose norm is about u √S,
S = Σ_i ‖b_i‖² ‖a_i‖² over columns of B and rows of A. Processors round differently, so that noise of this size must not decide a
rank. A component counts where

    σ² ≥ (ROUNDINGS u)² S

Numbers stored in 16 bits have the same floor, not one of 2⁻⁸: what storing made of an update is part of the adapter. Numbers of
float64 have the u of float64. Gram matrices add about r roundings of float64, below which nothing counts in any dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bslora_convert.modules.factors import Factors, Shape

CHOLESKY_FLOOR = 1e-7  # smallest pivot, against unit rows, that still leaves half of float64's digits
ROUNDINGS = 8  # unit roundoffs by which a number of a factor may be off: some operations made it, with a margin
CHUNK = 1 << 17  # numbers cast to float64 at a time: a megabyte, which stays in cache


class Delta(Protocol):
    """What the fit needs of an input module: its shape and its factors, scaling folded in."""

    @property
    def shape(self) -> Shape:
        """(out, in)."""

    @property
    def rank(self) -> int:
        """Inner size r of the factors."""

    @property
    def stored(self) -> Factors:
        """Factors (out, r), (r, in) as they are stored, scaling not applied."""

    @property
    def scaling(self) -> float:
        """What the stored product is multiplied by."""

    def factors(self) -> Factors:
        """Factors (out, r), (r, in) in the compute dtype (float32 or float64), scaling folded into the first."""


def gram(x: Tensor, y: Tensor | None = None) -> Tensor:
    """xᵀ y (xᵀ x without y) in float64: (n, p), (n, q) -> (p, q)."""
    y = x if y is None else y
    total = torch.zeros((x.shape[1], y.shape[1]), dtype=torch.float64, device=x.device)
    rows = max(CHUNK // max(x.shape[1], 1), 1)
    for start in range(0, x.shape[0], rows):
        left = x[start : start + rows].double()
        total.addmm_(left.T, left if y is x else y[start : start + rows].double())
    return total


def gram_beside(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(xᵀ y, yᵀ y) in float64, y cast once: (n, p), (n, q) -> (p, q), (q, q)."""
    cross = torch.zeros((x.shape[1], y.shape[1]), dtype=torch.float64, device=x.device)
    own = torch.zeros((y.shape[1], y.shape[1]), dtype=torch.float64, device=x.device)
    rows = max(CHUNK // max(x.shape[1], 1), 1)
    for start in range(0, x.shape[0], rows):
        right = y[start : start + rows].double()
        cross.addmm_(x[start : start + rows].double().T, right)
        own.addmm_(right.T, right)
    return cross, own


def null_share(dtype: torch.dtype, r: int) -> float:
    """Share of S, the squared size of r products of a column and a row, below which a squared singular value is rounding.

    dtype: of the arithmetic that made the numbers. Against the largest eigenvalue of A Aᵀ it says the same of a direction of A.
    """
    return max((ROUNDINGS * torch.finfo(dtype).eps / 2) ** 2, float64_share(r))


def float64_share(r: int) -> float:
    """Share of its largest eigenvalue below which an eigenvalue of an r×r Gram matrix is rounding of float64."""
    return r * torch.finfo(torch.float64).eps


@dataclass(frozen=True, slots=True)
class Grams:
    """BᵀB and A Aᵀ of one product, (r, r) each, float64. dtype: of the arithmetic that made the factors."""

    b: Tensor
    a: Tensor
    dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, factors: Factors) -> "Grams":
        """Gram matrices of the two factors."""
        return cls(gram(factors.b), gram(factors.a.T), _arithmetic(factors.b.dtype))

    @classmethod
    def of_delta(cls, delta: Delta) -> "Grams":
        """Gram matrices of a module's factors, from the stored numbers in one cast."""
        stored = delta.stored
        return cls(gram(stored.b) * delta.scaling**2, gram(stored.a.T), _arithmetic(stored.b.dtype))

    @property
    def energy(self) -> float:
        """‖BA‖_F² = tr(BᵀB · AAᵀ)."""
        return float((self.b * self.a).sum())

    @property
    def size(self) -> float:
        """S = Σ ‖b_i‖² ‖a_i‖², against which roundings count; larger than the energy where products cancel."""
        return float((self.b.diagonal() * self.a.diagonal()).clamp_min(0).sum())


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype that numbers are computed in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class ProductSvd:
    """SVD of B A in terms of the factors: U diag(σ) = B @ left, Vᵀ = right @ A.

    energies: σ² (q,), falling, float64. left (r, q), right (q, r). q is the numerical rank (module docstring), at most r; of a
    product of zeros it is r.
    """

    energies: Tensor
    left: Tensor
    right: Tensor

    def truncate(self, terms: Sequence[Factors], rank: int) -> Factors:
        """Best part of `rank` or less, balanced: √σ on both sides.

        terms: the products whose sum B A is, in the order in which their columns stand in B.
        """
        return combine(terms, *self.balanced(rank))

    def balanced(self, rank: int) -> tuple[Tensor, Tensor]:
        """(r, k), (k, r) by which B and A become the best part of `rank` or less, √σ on both sides."""
        rank = min(rank, self.energies.shape[0])
        root = self.energies[:rank].pow(0.25)
        scale = torch.where(root > 0, root, torch.ones_like(root))
        return self.left[:, :rank] / scale, self.right[:rank] * scale[:, None]


def combine(terms: Sequence[Factors], left: Tensor, right: Tensor) -> Factors:
    """([b1 b2 …] left, right [a1; a2; …]) without putting the terms together: (out, k), (k, in)."""
    dtype = terms[0].b.dtype
    sizes = [term.rank for term in terms]
    lefts, rights = left.to(dtype).split(sizes, dim=0), right.to(dtype).split(sizes, dim=1)
    b, a = terms[0].b @ lefts[0], rights[0] @ terms[0].a
    for term, columns, rows in zip(terms[1:], lefts[1:], rights[1:], strict=True):
        b, a = b.addmm_(term.b, columns), a.addmm_(rows, term.a)
    return Factors(b, a)


def product_svd(grams: Grams) -> ProductSvd:
    """SVD of the product whose Gram matrices these are (module docstring)."""
    r = grams.a.shape[0]
    if r == 0:
        nothing = grams.a.new_zeros((0,))
        return ProductSvd(nothing, grams.a, grams.a)
    length = grams.a.diagonal().clamp_min(0).sqrt()
    length = torch.where(length > 0, length, torch.ones_like(length))
    unit_a = grams.a / torch.outer(length, length)
    scaled_b = grams.b * torch.outer(length, length)
    lower, lower_inverse = _root(unit_a)
    h = lower.T @ scaled_b @ lower
    values, vectors = torch.linalg.eigh((h + h.T) / 2)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    rank = int((values >= null_share(grams.dtype, r) * grams.size).sum())
    values, vectors = values[:rank], vectors[:, :rank]
    left = length[:, None] * (lower @ vectors)
    right = (vectors.T @ lower_inverse) / length
    return ProductSvd(values, left, right)


def _root(gram_a: Tensor) -> tuple[Tensor, Tensor]:
    """L (r, q) and its left inverse (q, r) with L Lᵀ = gram_a."""
    lower, failed = torch.linalg.cholesky_ex(gram_a)
    if not int(failed) and float(lower.diagonal().min()) > CHOLESKY_FLOOR:
        identity = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
        return lower, torch.linalg.solve_triangular(lower, identity, upper=False)
    values, vectors = torch.linalg.eigh(gram_a)
    kept = values > float64_share(len(values)) * values.max().clamp_min(torch.finfo(values.dtype).tiny)
    root = values[kept].sqrt()
    return vectors[:, kept] * root, (vectors[:, kept] / root).T


def mix_of(vectors: Tensor, base: Tensor) -> Tensor:
    """T (k, r₀), float64, of least ‖vectors − T base‖: (k, n), (r₀, n). Rows of base may depend on each other, or be zero."""
    along = base.double()
    found: Tensor = vectors.double() @ along.T @ torch.linalg.pinv(along @ along.T, hermitian=True)
    return found


def residual_energy(target: Factors, target_grams: Grams, approximation: Factors) -> float:
    """‖BA − B̂Â‖_F² from Gram matrices, float64: exact to about 1e-15 of ‖BA‖²."""
    return max(target_grams.energy - 2 * inner(target, approximation) + Grams.of(approximation).energy, 0.0)


def inner(first: Factors, second: Factors) -> float:
    """⟨B₁A₁, B₂A₂⟩ in float64."""
    return float((gram(first.b, second.b) * gram(first.a.T, second.a.T)).sum())
