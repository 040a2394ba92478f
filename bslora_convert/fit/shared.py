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
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.bslora.transforms import Kronecker, Slice
from bslora_convert.fit.parallel import each
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import gram

Own = dict[str, Tensor]

SKETCH = 8  # random directions in which the starting subspaces are measured
CORE = 8  # largest core of the starting block; further ranks enter with the first pair step
POWER_STEPS = 12  # power iterations for the starting subspaces and their core
SLICE_ROUNDS = 2  # rounds that turn random rows into leading ones before the rest of the form sees them
RIDGE = 1e-12  # of the largest normal equation: keeps uncovered rows at zero


@dataclass(frozen=True, slots=True)
class Sum:
    """A matrix held as [b1 b2 …] core [a1; a2; …]: thin products side by side, joined by a small core (q, q).

    The wide factors are never copied together; a truncated SVD of the same products is only another core.
    """

    terms: Sequence[Factors]
    core: Tensor

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return self.terms[0].b.shape[0], self.terms[0].a.shape[1]

    @property
    def transposed(self) -> "Sum":
        """The transposed matrix."""
        return Sum([Factors(term.a.T, term.b.T) for term in self.terms], self.core.T)

    def times(self, x: Tensor) -> Tensor:
        """The matrix times x: (in, c) -> (out, c)."""
        inner = self.core @ torch.cat([term.a @ x for term in self.terms])
        pieces = inner.split([term.rank for term in self.terms])
        out: Tensor = self.terms[0].b @ pieces[0]
        for term, piece in zip(self.terms[1:], pieces[1:], strict=True):
            out.addmm_(term.b, piece)
        return out


@dataclass(frozen=True, slots=True)
class Member:
    """A module of the group: its shape, its kernels so far, and its residual, made when asked for."""

    shape: Shape
    own: Own
    residual: Callable[[], "Sum"]


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
        pair = _leading_block(transform, members, rank, generator)
    else:
        rows = torch.randn((transform.size_in, rank), dtype=torch.float64, generator=generator)
        pair = Factors(torch.zeros((transform.size_out, rank)), torch.linalg.qr(rows)[0].T)
    pair = Factors(pair.b.to(like), pair.a.to(like))
    for _ in range(SLICE_ROUNDS if isinstance(transform, Slice) else 0):
        pair = update(transform, members, pair, kernel_rank).pair
    return update(transform, members, pair, kernel_rank)


def widen(pair: Factors, rank: int, generator: torch.Generator) -> Factors:
    """The same product with room for `rank`: new rows of A_s are random, new columns of B_s zero."""
    missing = rank - pair.rank
    if missing <= 0:
        return pair
    width = pair.a.shape[1]
    fresh = torch.randn((missing, width), dtype=torch.float64, generator=generator) / width**0.5
    return Factors(
        torch.cat([pair.b, pair.b.new_zeros((pair.b.shape[0], missing))], dim=1),
        torch.cat([pair.a, fresh.to(pair.a)], dim=0),
    )


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


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix, falling, and their vectors as columns: at most `count`."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]


def _dominant(matrix: Tensor, begin: Tensor) -> Tensor:
    """Directions that a few power steps on a symmetric matrix single out: (s, s), (s, p) -> (s, p), orthonormal."""
    basis = begin.to(matrix)
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(matrix @ basis)[0]
    return basis


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


def _leading_block(transform: Kronecker, members: Sequence[Member], rank: int, generator: torch.Generator) -> Factors:
    """A first P from the higher-order SVD of all blocks of all members.

    B_s spans the leading eigenvectors of Σ block·blockᵀ, A_s those of Σ blockᵀ·block, both measured on random
    combinations of columns and rows; the core Q that joins them is the leading direction of the projected blocks.
    """
    s = transform.size
    longest = max(max(member.shape) for member in members)
    noise = torch.randn((longest, SKETCH), generator=generator)
    rows = torch.zeros((s, s), dtype=torch.float64)
    columns = torch.zeros((s, s), dtype=torch.float64)

    def seen(member: Member) -> tuple[Tensor, Tensor]:
        """Σ block·blockᵀ and Σ blockᵀ·block as the noise shows them."""
        residual = member.residual()
        random = noise.to(residual.core)
        sides = residual.times(random[: residual.shape[1]]), residual.transposed.times(random[: residual.shape[0]])
        flats = [
            transform.blocks(side, grid).transpose(0, 1).reshape(s, -1)
            for side, grid in zip(sides, transform.grid(member.shape), strict=True)
        ]
        return (flats[0] @ flats[0].T).cpu(), (flats[1] @ flats[1].T).cpu()

    for of_rows, of_columns in each(seen, members):
        rows += of_rows
        columns += of_columns
    core = min(rank, CORE)
    b, a = _dominant(rows, noise[:s, :core]), _dominant(columns, noise[:s, :core])
    if core == 1:
        return widen(Factors(b, a.T), rank, generator)
    projected = []
    for member in members:
        down, across = transform.grid(member.shape)
        residual = member.residual()
        left, right = b.to(residual.core), a.to(residual.core)
        left = torch.cat([transform.project(term.b, left) for term in residual.terms], dim=2)  # (out/s, p, q)
        right = torch.cat([transform.project(term.a.T, right) for term in residual.terms], dim=2)  # (in/s, p, q)
        blocks = torch.einsum("gaq,hbq->ghab", left @ residual.core, right)
        projected.append(blocks.reshape(down * across, core * core).double().cpu())
    stacked = torch.cat(projected)
    q = stacked[stacked.square().sum(1).argmax()]
    for _ in range(POWER_STEPS):
        q = stacked.T @ (stacked @ q)
        q = q / q.norm().clamp_min(torch.finfo(q.dtype).tiny)
    return widen(Factors(b @ q.reshape(core, core), a.T), rank, generator)
