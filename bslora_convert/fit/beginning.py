"""Where the shared pair of a Kronecker group begins: the leading directions of all blocks of all its members."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bslora_convert.bslora.transforms import Kronecker
from bslora_convert.fit.parallel import each
from bslora_convert.fit.residual import Member
from bslora_convert.modules.factors import Factors

SKETCH = 8  # random directions in which the starting subspaces are measured
CORE = 8  # largest core of the starting block; further ranks enter with the first pair step
POWER_STEPS = 12  # power iterations for the starting subspaces and their core


def leading_block(transform: Kronecker, members: Sequence[Member], rank: int, generator: torch.Generator) -> Factors:
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
    b, a = dominant(rows, noise[:s, :core]), dominant(columns, noise[:s, :core])
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


def leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues of a symmetric matrix, falling, and their vectors as columns: at most `count`."""
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0)[:count].clamp_min(0), vectors.flip(1)[:, :count]


def dominant(matrix: Tensor, begin: Tensor) -> Tensor:
    """Directions that a few power steps on a symmetric matrix single out: (s, s), (s, p) -> (s, p), orthonormal."""
    basis = begin.to(matrix)
    for _ in range(POWER_STEPS):
        basis = torch.linalg.qr(matrix @ basis)[0]
    return basis


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
