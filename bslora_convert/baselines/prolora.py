"""PRoLoRA (arXiv 2402.16902): each factor is a chunk, repeated along its side and rotated along the rank, and an unshared part.

    A = [A_u; A_0 | roll(A_0) | … | roll^(m−1)(A_0)]      A_u (u, in), A_0 (p, in / m), roll^i: row t is row (t + i s_A) mod p
    B = [B_u, the same of B_0 downwards, n chunks]         B_u (out, u), B_0 (out / n, p)
    ΔW = B A, rank r = u + p                               Σ_m u (in + out) + p (in / m + out / n) numbers

with the strides s_A = max(⌊p / m⌋, 1), s_B = max(⌊p / n⌋, 1). Nothing is shared between modules; u = r is LoRA. Block (j, i) of
the shared part is B_0 Π^(i s_A − j s_B) A_0, Π the rotation by one, so m n blocks are at most p different ones.

The fit alternates exact least squares for all that is stored of A and of B, for ΔW = P Q with P (out, R), Q (R, in). The columns
that stand at one place of all m chunks have in common the unknowns x = (A_0's column, A_u's m columns), of p + m u numbers, and
chunk i has the rows Z_i x of A, Z_i zeros and ones (r, p + m u). So one small system serves all in / m places:

    (Σ_i Z_iᵀ BᵀB Z_i) X = Σ_i Z_iᵀ BᵀP Q_i            X (p + m u, in / m), Q_i the columns of chunk i; B likewise, transposed

The systems are float64 and solved for the change, so no step raises the objective. The problem has local optima: starts are
the truncated SVD brought into the form by averages, which leave whole directions empty and so are disturbed a little, and random
ones; each runs for a few sweeps, which start ahead (`strides`), and the best goes on.

m = n = 2, a chunk a side where two don't divide it. For as many numbers u may be traded for p two to one: none, half and all but
p = 2 of what fits unshared are tried, and what loses least over all modules is taken.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bslora_convert.baselines.baseline import Fitted, OutOfReach, largest, rounded
from bslora_convert.baselines.proximal import toward_optimum
from bslora_convert.baselines.strides import best_of
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import Grams

CHUNKS = 2  # m and n
LEAST_SHARED = 2  # p: a rank of one has nothing to rotate
DISTURBED = (0.1, 1.0, 1.0, 1.0, 1.0)  # noise in each start, against what stands there
TRIAL_SWEEPS = 3  # of each start
SWEEPS = 40


@dataclass(frozen=True, slots=True)
class RolledSide:
    """How one factor is put together: `chunks` times p shared rows, rotated by `stride` each, below u unshared ones.

    What is stored is x (p + chunks · u, side / chunks): A_0, then the chunks of A_u.
    """

    unshared: int
    shared: int
    chunks: int

    @classmethod
    def of(cls, side: int, unshared: int, shared: int) -> "RolledSide":
        """Of a side so long: chunks as `CHUNKS` where they divide it."""
        return cls(unshared, shared, math.gcd(side, CHUNKS))

    @property
    def stride(self) -> int:
        """s: how far each chunk is rotated beyond the last."""
        return max(self.shared // self.chunks, 1)

    @property
    def rows(self) -> Tensor:
        """Which row of x stands in each row of each chunk: (chunks, r)."""
        chunk = torch.arange(self.chunks)[:, None]
        own = self.shared + chunk * self.unshared + torch.arange(self.unshared)
        return torch.cat([own, (torch.arange(self.shared) + chunk * self.stride) % self.shared], dim=1)

    def spread(self, x: Tensor) -> Tensor:
        """What is stored as the factor: (p + chunks · u, w) -> (r, chunks · w)."""
        return x[self.rows].transpose(0, 1).reshape(self.unshared + self.shared, -1)

    def gathered(self, factor: Tensor) -> Tensor:
        """The sum of the factor's entries at what each number of x stands for, spread's transpose: (r, side) -> x."""
        pieces = factor.reshape(len(factor), self.chunks, -1).transpose(0, 1)
        x = factor.new_zeros((self.shared + self.chunks * self.unshared, pieces.shape[2]))
        return x.index_add_(0, self.rows.flatten().to(x.device), pieces.flatten(0, 1))

    def normal(self, gram: Tensor) -> Tensor:
        """Σ_i Z_iᵀ gram Z_i: (r, r) -> (q, q)."""
        picks = torch.nn.functional.one_hot(self.rows, self.shared + self.chunks * self.unshared).to(gram)
        return (picks.mT @ gram @ picks).sum(0)

    def mean(self, factor: Tensor) -> Tensor:
        """The x whose factor is nearest to this one."""
        x = self.gathered(factor)
        x[: self.shared] /= self.chunks
        return x


@dataclass(frozen=True, slots=True)
class Chunks:
    """What one module stores: x of Bᵀ and x of A, and how they are put together."""

    b: Tensor
    a: Tensor
    sides: tuple[RolledSide, RolledSide]

    def delta(self) -> Factors:
        """Its update: (out, r), (r, in)."""
        return Factors(self.sides[0].spread(self.b).T, self.sides[1].spread(self.a))

    def beyond(self, before: "Chunks", stride: float) -> "Chunks":
        """A point on the line from `before` through this one, `stride` of their distance further on."""
        return Chunks(self.b + stride * (self.b - before.b), self.a + stride * (self.a - before.a), self.sides)

    def disturbed(self, share: float, generator: torch.Generator) -> "Chunks":
        """The same with normal noise, so large against it, or noise instead of it where that is 1."""

        def mixed(x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
            return (1 - share) * x + share * x.square().mean().sqrt() * noise

        return Chunks(mixed(self.b), mixed(self.a), self.sides)

    def balanced(self) -> "Chunks":
        """The same update, both sides as long."""
        b, a = float(self.b.norm()), float(self.a.norm())
        ratio = math.sqrt(b / a) if b > 0 and a > 0 else 1.0
        return Chunks(self.b / ratio, self.a * ratio, self.sides)

    def stored(self, storage: torch.dtype) -> "Chunks":
        """As it comes back from a file."""
        return Chunks(rounded(self.b, storage), rounded(self.a, storage), self.sides)


def fit_prolora(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """Chunks and an unshared part of every module, of one size for all.

    :raises OutOfReach: when two shared ranks are more than the budget.
    """
    shapes = source.shapes
    best = None
    for unshared, shared in _layouts(source, budget):
        found = dict(zip(shapes, each(partial(_fitted, source, unshared, shared, storage, seed), shapes), strict=True))
        lost = sum(one for _, one in found.values())
        if best is None or lost < best[0]:
            best = lost, unshared, shared, found
    assert best is not None  # there is one layout at least
    _, unshared, shared, found = best
    deltas = {name: chunks.delta() for name, (chunks, _) in found.items()}
    settings = {"rank": unshared + shared, "unshared": unshared, "chunks": CHUNKS}
    return Fitted(deltas, prolora_parameters(shapes, unshared, shared), settings)


def _fitted(
    source: Source, unshared: int, shared: int, storage: torch.dtype, seed: int, name: str
) -> tuple[Chunks, float]:
    target = source.deltas[name].factors()
    start = source.svds[name].truncate([target], unshared + shared)
    chunks, history = fit_chunks(target, start, unshared, shared, seed)
    return chunks.balanced().stored(storage), history[-1]


def prolora_parameters(shapes: Mapping[str, Shape], unshared: int, shared: int) -> int:
    """Numbers that PRoLoRA stores."""
    sides = [side for shape in shapes.values() for side in shape]
    return sum(unshared * side + shared * side // RolledSide.of(side, unshared, shared).chunks for side in sides)


def fit_chunks(target: Factors, start: Factors, unshared: int, shared: int, seed: int) -> tuple[Chunks, list[float]]:
    """One module in this form, float64, and the objective after each of its sweeps (module docstring).

    target: (out, R), (R, in). start: the truncated SVD of it, of rank u + p or less, strongest first.
    """
    target, start = target.to(torch.float64), start.to(torch.float64).padded(unshared + shared)
    energy = Grams.of(target).energy
    out, width = target.shape
    sides = RolledSide.of(out, unshared, shared), RolledSide.of(width, unshared, shared)
    svd = Chunks(sides[0].mean(start.b.T), sides[1].mean(start.a), sides)
    generator = torch.Generator("cpu").manual_seed(seed)
    starts = [svd.disturbed(share, generator) for share in DISTURBED]
    return best_of(starts, partial(_sweep, target, energy), energy, TRIAL_SWEEPS, SWEEPS)


def _layouts(source: Source, budget: int) -> list[tuple[int, int]]:
    """(u, p) that are tried."""
    shapes = source.shapes

    def cost(unshared: int, shared: int) -> int:
        return prolora_parameters(shapes, unshared, shared)

    if cost(0, LEAST_SHARED) > budget:
        raise OutOfReach(f"PRoLoRA needs {cost(0, LEAST_SHARED)} numbers at least, the budget is {budget}")
    limit = max(delta.rank for delta in source.deltas.values())
    most = max(unshared for unshared in range(limit + 1) if cost(unshared, LEAST_SHARED) <= budget)
    return [
        (unshared, largest(partial(cost, unshared), budget, CHUNKS * limit, "PRoLoRA"))
        for unshared in sorted({0, most // 2, most})
    ]


def _sweep(target: Factors, energy: float, chunks: Chunks) -> tuple[Chunks, float]:
    """B, then A, each at its optimum given the other, and the objective then."""
    of_b, of_a = chunks.sides
    a = of_a.spread(chunks.a)
    right = of_b.gathered((a @ target.a.T) @ target.b.T)
    new_b = toward_optimum(of_b.normal(a @ a.T), right, chunks.b)
    b = of_b.spread(new_b)
    normal, right = of_a.normal(b @ b.T), of_a.gathered((b @ target.b) @ target.a)
    new_a = toward_optimum(normal, right, chunks.a)
    lost = energy - float((new_a * (2 * right - normal @ new_a)).sum())
    return Chunks(new_b, new_a, chunks.sides), max(lost, 0.0)
