"""One sharing group: the best shared pair and kernels for what the rest of the form leaves over.

R_m is a member's delta minus everything but this group's term. With E_m, F_m the transform's maps from the shared size to the
module's rows and columns (a window for SS, K ⊗ I for KE), the group's objective is

    Σ_m ‖R_m − Σ_t E_mt P F_mtᵀ‖²,   P = B_s A_s (s, s) of rank p,   t: the module's kernel columns

E_mtᵀE_mu and F_mtᵀF_mu are diagonal (`coverage`), so P sees each of its entries with a weight of its own:

    W = Σ_m Σ_tu cov_out(t,u) cov_in(t,u)ᵀ,   N = Σ_m Σ_t E_mtᵀ R_m F_mt

Pair, equal weights (KE whose size divides every side): P = rank-p truncation of N / w.
Pair, unequal weights (SS, KE with cut edges): each row of B_s, then each column of A_s, from its own p×p normal equations.
Kernels (KE): with C_ij = ⟨block_ij of R, P⟩, K_B K_A = rank-k truncation of C / ‖P‖²; with cut edges, rows of K_B, then
columns of K_A, from weighted normal equations.

Every step is the exact optimum of what it updates given the rest, so none of them raises the objective.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.bslora.transforms import Kronecker, Slice
from bslora_convert.fit.beginning import leading, leading_block
from bslora_convert.fit.parallel import each
from bslora_convert.fit.residual import Member, Own, Sum
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import gram

SLICE_ROUNDS = 2  # rounds that turn random rows into leading ones before the rest of the form sees them
RIDGE = 1e-12  # of the largest normal equation: keeps uncovered rows at zero


@dataclass(frozen=True, slots=True)
class Update:
    """A group after one round: the pair (s_out, p), (p, s_in) and each member's own tensors.

    headroom: energy that a pair of twice the rank would take with the same kernels; infinite where it isn't known.
    """

    pair: Factors
    owns: list[Own]
    headroom: float = math.inf


def update(transform: Kronecker | Slice, members: Sequence[Member], pair: Factors, kernel_rank: int) -> Update:
    """One round: kernels given the pair, then the pair given the kernels."""
    if isinstance(transform, Kronecker):
        if all(transform.divides(member.shape) for member in members):
            return _update_even(transform, members, pair, kernel_rank)
        owns = [_kernels(transform, m, m.residual(), pair, kernel_rank) for m in members]
    else:
        owns = [member.own for member in members]
    pair = _half_step(transform, members, owns, pair)
    return Update(_flip(_half_step(transform, members, owns, _flip(pair), flipped=True)), owns)


def start(
    transform: Kronecker | Slice,
    members: Sequence[Member],
    rank: int,
    kernel_rank: int,
    generator: torch.Generator,
) -> Update:
    """A first round for a group that has no pair: from the leading directions (KE) or from random rows (SS)."""
    like = members[0].residual().terms[0].b
    if isinstance(transform, Kronecker):
        pair = leading_block(transform, members, rank, generator)
    else:
        rows = torch.randn((transform.size_in, rank), dtype=torch.float64, generator=generator)
        pair = Factors(torch.zeros((transform.size_out, rank)), torch.linalg.qr(rows)[0].T)
    pair = Factors(pair.b.to(like), pair.a.to(like))
    for _ in range(SLICE_ROUNDS if isinstance(transform, Slice) else 0):
        pair = update(transform, members, pair, kernel_rank).pair
    return update(transform, members, pair, kernel_rank)


def _kernels(transform: Kronecker, member: Member, residual: Sum, pair: Factors, kernel_rank: int) -> Own:
    """Best kernels of one module given the pair: {"A": (k, in/s), "B": (out/s, k)}."""
    down, across = transform.grid(member.shape)
    rank = min(kernel_rank, down, across)
    c = _block_products(transform, residual, pair)
    weights = _block_energies(transform, member.shape, pair)
    if float(weights.max()) == 0.0:
        return {"A": pair.a.new_zeros((rank, across)), "B": pair.b.new_zeros((down, rank))}
    if transform.divides(member.shape):
        own = _rank_k(c / weights[0, 0], rank)
    else:
        current = member.own
        if not current or current["A"].shape[0] != rank:
            current = _rank_k(torch.where(weights > 0, c / weights, torch.zeros_like(c)), rank)
        a = current["A"].double()
        b = _weighted_rows(c, weights, a)
        a = _weighted_rows(c.T, weights.T, b.T).T
        own = {"A": a, "B": b}
    return {name: tensor.to(pair.b.dtype) for name, tensor in own.items()}


def _block_products(transform: Kronecker, residual: Sum, pair: Factors) -> Tensor:
    """C_ij = ⟨block_ij of the residual, P⟩, float64: (out/s, in/s)."""
    rows = torch.cat([transform.project(term.b, pair.b) for term in residual.terms], dim=2)  # (out/s, p, q)
    columns = torch.cat([transform.project(term.a.T, pair.a.T) for term in residual.terms], dim=2)  # (in/s, p, q)
    return (rows @ residual.core).flatten(1).double() @ columns.flatten(1).double().T


def _block_energies(transform: Kronecker, shape: Shape, pair: Factors) -> Tensor:
    """‖P cut to block ij‖², float64: (out/s, in/s), all equal but at cut edges."""

    def edges(side: Tensor, length: int) -> Tensor:
        """Gram matrices of the whole and of the cut factor, one for each block: (grid, p, p)."""
        whole, edge = divmod(length, transform.size)
        matrices = gram(side).expand(whole, -1, -1)
        return torch.cat([matrices, gram(side[:edge])[None]]) if edge else matrices

    rows = edges(pair.b, shape[0]).flatten(1)
    columns = edges(pair.a.T, shape[1]).flatten(1)
    return (rows @ columns.T).clamp_min(0)


def _rank_k(matrix: Tensor, rank: int) -> Own:
    """Rank-k truncation of a small dense matrix, √σ on both sides."""
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return {"B": u[:, :rank] * root, "A": root[:, None] * vh[:rank]}


def _weighted_rows(c: Tensor, weights: Tensor, a: Tensor) -> Tensor:
    """Rows b_i that minimise Σ_j w_ij (c_ij / w_ij − b_i a_j)²: (g, h), (g, h), (k, h) -> (g, k)."""
    normal = torch.einsum("gh,kh,lh->gkl", weights, a, a)
    return _solve(normal, c @ a.T)


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """Solutions of many small symmetric systems: (n, p, p), (n, p) -> (n, p); a system of zeros gives zero."""
    ridge = (RIDGE * normal.diagonal(dim1=-2, dim2=-1).amax()).clamp_min(torch.finfo(normal.dtype).tiny)
    identity = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    solution: Tensor = torch.linalg.solve(normal + ridge * identity, right[..., None])
    return solution[..., 0]


def _update_even(transform: Kronecker, members: Sequence[Member], pair: Factors, kernel_rank: int) -> Update:
    """Kernels of every member, then the pair, in one pass over the residuals: all blocks whole, all weights equal."""
    s = transform.size
    total = torch.zeros((s, s), dtype=torch.float64, device=pair.b.device)
    weight = 0.0
    owns: list[Own] = []

    def fit(member: Member) -> tuple[Own, Tensor, float]:
        """The member's kernels, its sum of scaled blocks (s, s), and the weight of that sum."""
        residual = member.residual()
        own = _kernels(transform, member, residual, pair, kernel_rank)
        rows = torch.cat([transform.gather(term.b, s, own["B"]) for term in residual.terms], dim=2)
        columns = torch.cat([transform.gather(term.a.T, s, own["A"].T) for term in residual.terms], dim=2)
        blocks = ((rows @ residual.core) @ columns.transpose(1, 2)).sum(0)
        return own, blocks, float((gram(own["B"]) * gram(own["A"].T)).sum())

    for own, blocks, share in each(fit, members):
        owns.append(own)
        total += blocks
        weight += share
    if weight == 0.0:
        return Update(pair, owns, 0.0)
    mean = total / weight
    energies, basis = leading(mean @ mean.T, 2 * pair.rank)
    headroom = weight * float(energies[pair.rank :].sum())
    return Update(_project(mean, energies, basis, pair), owns, headroom)


def _project(matrix: Tensor, energies: Tensor, basis: Tensor, like: Factors) -> Factors:
    """Best approximation of a dense (s, s) matrix with the rank and dtype of `like`, balanced."""
    rank = like.rank
    root = energies[:rank].pow(0.25)
    safe = torch.where(root > 0, root, torch.ones_like(root))
    columns = basis[:, :rank]
    return Factors((columns * safe).to(like.b.dtype), ((columns.T @ matrix) / safe[:, None]).to(like.b.dtype))


def _flip(pair: Factors) -> Factors:
    """The transposed product."""
    return Factors(pair.a.T, pair.b.T)


def _half_step(
    transform: Kronecker | Slice,
    members: Sequence[Member],
    owns: Sequence[Own],
    pair: Factors,
    flipped: bool = False,
) -> Factors:
    """Best B_s given A_s under entry weights; `flipped` does the same for the transposed problem (A_s given B_s)."""
    basis = torch.linalg.qr(pair.a.double().T)[0].T  # (p, s_in), orthonormal rows keep the systems well conditioned
    fixed = basis.to(pair.a.dtype)
    size_out, size_in = pair.b.shape[0], pair.a.shape[1]
    p = fixed.shape[0]
    numerator = torch.zeros((size_out, p), dtype=torch.float64, device=fixed.device)
    normal = torch.zeros((size_out, p, p), dtype=torch.float64, device=fixed.device)
    repeated: dict[Shape, int] = {}
    one = fixed.new_ones((1, 1))
    for member, own in zip(members, owns, strict=True):
        residual = member.residual().transposed if flipped else member.residual()
        out, width = residual.shape
        k_out, k_in = _sides(own, flipped, one)
        projected = residual.times(transform.spread(fixed.T, width, k_in))  # (out, k·p)
        for t in range(k_in.shape[1]):
            block = projected[:, t * p : (t + 1) * p]
            numerator += transform.gather(block, size_out, k_out[:, t : t + 1])[0].double()
        if isinstance(transform, Slice):  # without kernels the normal equations depend on the shape alone
            repeated[out, width] = repeated.get((out, width), 0) + 1
        else:
            normal += _normal(transform, basis, (out, width), size_out, size_in, k_out, k_in)
    for shape, count in repeated.items():
        normal += count * _normal(transform, basis, shape, size_out, size_in, one, one)
    return Factors(_solve(normal, numerator).to(fixed.dtype), fixed)


def _sides(own: Own, flipped: bool, one: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels of the rows and of the columns as (grid, k), a single one for a transform without kernels."""
    if not own:
        return one, one
    return (own["A"].T, own["B"]) if flipped else (own["B"], own["A"].T)


def _normal(
    transform: Kronecker | Slice,
    basis: Tensor,
    shape: Shape,
    size_out: int,
    size_in: int,
    k_out: Tensor,
    k_in: Tensor,
) -> Tensor:
    """One member's share of the rows' normal equations: (s_out, p, p)."""
    cover_out = transform.coverage(shape[0], size_out, k_out).to(basis.device)
    cover_in = transform.coverage(shape[1], size_in, k_in).to(basis.device)
    inner = torch.einsum("ps,tus,qs->tupq", basis, cover_in, basis)
    return torch.einsum("tus,tupq->spq", cover_out, inner)
