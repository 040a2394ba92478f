"""How much two updates have in common, in factor space, and what two random ones would.

    ΔW₁ = U₁ S₁ V₁ᵀ, ΔW₂ = U₂ S₂ V₂ᵀ, ranks r₁, r₂

    angles     singular values of U₁ᵀU₂ are the cosines of the principal angles between the column spaces (V for the rows)
    overlap    ‖U₁ᵀU₂‖_F² / min(r₁, r₂), their mean square                      random: max(r₁, r₂) / n
    z          overlap against random subspaces: ‖U₁ᵀU₂‖_F² has mean r₁ r₂ / n and variance
               2 r₁ r₂ (n − r₁)(n − r₂) / (n² (n − 1)(n + 2))                   (Haar measure on the orthogonal group)
    CKA        ‖ΔW₂ᵀΔW₁‖_F² / (‖ΔW₁ᵀΔW₁‖_F ‖ΔW₂ᵀΔW₂‖_F), linear and not centred   of the outputs; of ΔW ᵀ for the inputs

Column spaces are compared where the output sizes agree, row spaces where the input sizes do.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.modules.factors import Factors
from bslora_convert.modules.lowrank import Grams, gram, product_svd

NULL = 1e-10  # squared singular values below this share of the largest belong to no subspace
SIDES = ("columns", "rows")


@dataclass(frozen=True, slots=True)
class Spaces:
    """Orthonormal bases of an update's column space (out, q) and row space (in, q), and its singular values (q,), float64."""

    columns: Tensor
    rows: Tensor
    singular: Tensor

    @classmethod
    def of(cls, factors: Factors) -> "Spaces":
        """Bases of B A."""
        svd = product_svd(Grams.of(factors))
        kept = svd.energies > NULL * svd.energies[:1].sum().clamp_min(torch.finfo(torch.float64).tiny)
        sigma = svd.energies[kept].sqrt()
        columns = factors.b.double() @ svd.left[:, kept] / sigma
        rows = svd.right[kept] @ factors.a.double()
        return cls(columns, rows.T, sigma)

    def side(self, name: str) -> Tensor:
        """`columns` or `rows`."""
        return self.columns if name == "columns" else self.rows


def cosines(first: Tensor, second: Tensor) -> Tensor:
    """Cosines of the principal angles between two subspaces, falling: (n, p), (n, q) -> (min(p, q),)."""
    found: Tensor = torch.linalg.svdvals(gram(first, second))
    return found.clamp(0, 1)


@dataclass(frozen=True, slots=True)
class Pairs:
    """Every pair of some updates on one side, (m, m) each: mean squared cosine, its z-score, linear CKA."""

    overlap: Tensor
    z: Tensor
    cka: Tensor


def pairs(spaces: Sequence[Spaces], side: str) -> Pairs:
    """All pairs of updates whose sizes agree on a side (`columns` or `rows`)."""
    bases = [one.side(side) for one in spaces]
    n, ranks = bases[0].shape[0], torch.tensor([basis.shape[1] for basis in bases], dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(bases)), ranks.long())
    member = torch.nn.functional.one_hot(owner, len(bases)).double()  # (Σ rank, m): whose column each one is
    inner = gram(torch.cat(bases, dim=1)).square()
    square = member.T @ inner @ member
    energy = torch.cat([one.singular for one in spaces]).square()
    across = member.T @ (energy[:, None] * inner * energy) @ member
    p, q = ranks[:, None], ranks[None]
    spread = 2 * p * q * (n - p) * (n - q) / (n**2 * max(n - 1, 1) * (n + 2))
    z = torch.where(spread > 0, (square - p * q / n) / spread.clamp_min(1e-300).sqrt(), torch.zeros_like(square))
    norms = across.diagonal().sqrt()
    cka = across / torch.outer(norms, norms).clamp_min(1e-300)
    return Pairs(square / torch.minimum(p, q).clamp_min(1), z, cka)


def off_diagonal_mean(matrix: Tensor) -> float:
    """Mean over pairs of different updates; 0 for a single one."""
    m = matrix.shape[0]
    return float((matrix.sum() - matrix.diagonal().sum()) / (m * (m - 1))) if m > 1 else 0.0


def cosine(first: Tensor, second: Tensor) -> float:
    """Cosine of two matrices of one shape as vectors; 0 where one of them is nothing."""
    norms = float(first.double().norm() * second.double().norm())
    return float((first.double() * second.double()).sum()) / norms if norms > 0 else 0.0


def shared_initialisation(stored: Mapping[str, Tensor], threshold: float = 0.9) -> list[dict[str, object]]:
    """Pairs of modules whose stored A are nearly parallel: trained from the same start, or tied.

    stored: A (r, in) of each module, by name. A pair's `cosine` is that of the two matrices as vectors.
    """
    units: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
    for name, a in stored.items():
        norm = a.double().norm()
        if float(norm) > 0:
            units.setdefault(tuple(a.shape), []).append((name, (a.double() / norm).flatten()))
    found: list[dict[str, object]] = []
    for members in units.values():
        matrix = torch.stack([unit for _, unit in members])
        cosine = matrix @ matrix.T
        for i, j in (cosine.abs().triu(1) >= threshold).nonzero().tolist():
            found.append({"modules": [members[i][0], members[j][0]], "cosine": float(cosine[i, j])})
    return found
