"""ShareLoRA (arXiv 2406.10785): one factor of a kind of module is the same in every layer.

With i a layer, k a kind of module (`mlp.up_proj`) of L layers, p the rank, α/r folded into the factors:

    ShareA     ΔW_ik = B_ik A_k      A_k (p, in) shared over layers       Σ_k p (in + L out) numbers
    ShareB     ΔW_ik = B_k A_ik      B_k (out, p) shared over layers      Σ_k p (L in + out)
    ShareAB    ΔW_ik = B_k A_k       the same update in every layer       Σ_k p (in + out)
    ShareA-qkv                       one A for the query, key and value projections of all layers, private factors elsewhere

Each least-squares fit is a closed form, by Eckart and Young:

    ShareA     [B_1; …; B_L] A is any matrix of rank p, so the optimum is the truncated SVD of the stacked updates

                   [ΔW_1; …; ΔW_L] = blockdiag(B_1, …, B_L) [A_1; …; A_L]

               whose Gram matrices are blockdiag(B_iᵀB_i) and that of the concatenated A: ΣR × ΣR, never the stack itself
    ShareB     ShareA of the transposed updates
    ShareAB    Σ_i ‖ΔW_i − P‖² = L ‖mean ΔW − P‖² + what doesn't depend on P, so the truncated SVD of the mean

               with the Gram matrices of [B_1 … B_L] / L and [A_1; …; A_L]

The rank is one number for all kinds, the largest that fits, cut for a kind to the rank that its stack has.

ShareA-qkv is the paper's share-qkv variant as read here: the paper says that one A serves the query, key and value
projections and doesn't say what becomes of the rest. Here A is the same for all three and in all layers, where their inputs
have one width, and every other module keeps factors of its own, of the same rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from bslora_convert.baselines.baseline import Fitted, OutOfReach, kinds, largest, rounded
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import Grams, ProductSvd, gram, product_svd

QKV = ("q_proj", "k_proj", "v_proj", "query", "key", "value")

Terms = Mapping[str, Factors]
Deltas = dict[str, Factors]


@dataclass(frozen=True, slots=True)
class Tied:
    """Modules that share factors: the SVD of what they share, and what one rank of it stores."""

    names: Sequence[str]
    svd: ProductSvd
    unit: int

    @property
    def limit(self) -> int:
        """Ranks that there are to have."""
        return len(self.svd.energies)


def sharelora_a(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """A shared over the layers of a kind.

    :raises OutOfReach: when rank 1 is more than the budget.
    """
    return _share_a(source, _factors(source), list(kinds(source).values()), budget, storage, "ShareLoRA A")


def sharelora_b(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """B shared over the layers of a kind.

    :raises OutOfReach: when rank 1 is more than the budget.
    """
    terms = {name: flip(factors) for name, factors in _factors(source).items()}
    fitted = _share_a(source, terms, list(kinds(source).values()), budget, storage, "ShareLoRA B")
    return Fitted({name: flip(f) for name, f in fitted.deltas.items()}, fitted.parameters, fitted.settings)


def sharelora_ab(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """A and B shared over the layers of a kind: its mean update in every layer.

    :raises OutOfReach: when rank 1 is more than the budget.
    """
    groups = list(kinds(source).values())
    terms = _factors(source)
    tied = list(each(lambda names: mean_svd(terms, names), groups))
    rank = largest_rank(tied, budget, "ShareLoRA AB")
    deltas: Deltas = {}
    for group in tied:
        pair = mean_pair(terms, group, rank)
        deltas |= dict.fromkeys(group.names, Factors(rounded(pair.b, storage), rounded(pair.a, storage)))
    return Fitted(in_order(source, deltas), cost(tied, rank), {"rank": rank})


def sharelora_a_qkv(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """One A for all query, key and value projections; factors of their own for all other modules.

    :raises OutOfReach: when rank 1 is more than the budget, or there is no query, key or value projection.
    """
    together: dict[int, list[str]] = {}
    alone = []
    for name, (_, width) in source.shapes.items():
        if name.rpartition(".")[2] in QKV:
            together.setdefault(width, []).append(name)
        else:
            alone.append([name])
    if not together:
        raise OutOfReach(f"ShareLoRA A-qkv needs query, key or value projections, modules named {', '.join(QKV)}")
    groups = [*together.values(), *alone]
    return _share_a(source, _factors(source), groups, budget, storage, "ShareLoRA A-qkv")


def mean_svd(terms: Terms, names: Sequence[str]) -> Tied:
    """SVD of the mean update of some modules of one shape, in terms of their factors side by side."""
    b = torch.cat([terms[name].b for name in names], dim=1)
    a = torch.cat([terms[name].a for name in names])
    grams = Grams(gram(b) / len(names) ** 2, gram(a.T))
    return Tied(names, product_svd(grams), unit_of([(b.shape[0], a.shape[1])]))


def mean_pair(terms: Terms, tied: Tied, rank: int) -> Factors:
    """Best pair of at most this rank for the mean update: (out, p), (p, in)."""
    members = [terms[name] for name in tied.names]
    scaled = [Factors(term.b / len(members), term.a) for term in members]
    return tied.svd.truncate(scaled, min(rank, tied.limit))


def unit_of(shapes: Sequence[Shape]) -> int:
    """Numbers that one rank stores where modules of these shapes share A: in + Σ out."""
    return shapes[0][1] + sum(out for out, _ in shapes)


def cost(tied: Iterable[Tied], rank: int) -> int:
    """Numbers stored at one rank for all."""
    return sum(min(rank, group.limit) * group.unit for group in tied)


def largest_rank(tied: Sequence[Tied], budget: int, form: str) -> int:
    """The largest rank that fits.

    :raises OutOfReach: when rank 1 does not.
    """
    return largest(lambda rank: cost(tied, rank), budget, max(group.limit for group in tied), form)


def flip(factors: Factors) -> Factors:
    """The transposed product."""
    return Factors(factors.a.T, factors.b.T)


def in_order(source: Source, deltas: Mapping[str, Factors]) -> Deltas:
    """The modules in the order of the source."""
    return {name: deltas[name] for name in source.deltas}


def _factors(source: Source) -> Deltas:
    return {name: delta.factors() for name, delta in source.deltas.items()}


def _share_a(
    source: Source, terms: Terms, groups: Sequence[Sequence[str]], budget: int, storage: torch.dtype, form: str
) -> Fitted:
    """The closed form of ShareA for each group of modules; a group of one keeps its own factors."""
    tied = list(each(_stacker(terms), groups))
    rank = largest_rank(tied, budget, form)
    deltas: Deltas = {}
    for pieces in each(lambda group: _cut(terms, group, rank, storage), tied):
        deltas |= pieces
    return Fitted(in_order(source, deltas), cost(tied, rank), {"rank": rank})


def _stacker(terms: Terms) -> Callable[[Sequence[str]], Tied]:
    """SVD of the updates of a group stacked above one another (module docstring)."""

    def stacked(names: Sequence[str]) -> Tied:
        left = torch.block_diag(*(gram(terms[name].b) for name in names))
        right = gram(torch.cat([terms[name].a for name in names]).T)
        return Tied(names, product_svd(Grams(left, right)), unit_of([terms[name].shape for name in names]))

    return stacked


def _cut(terms: Terms, tied: Tied, rank: int, storage: torch.dtype) -> Deltas:
    """B_i (out_i, p) of every module and the A (p, in) of them all, balanced."""
    left, right = tied.svd.balanced(rank)
    a = torch.cat([terms[name].a for name in tied.names])
    shared = rounded(right.to(a.dtype) @ a, storage)
    rows = left.to(a.dtype).split([terms[name].rank for name in tied.names])
    return {
        name: Factors(rounded(terms[name].b @ part, storage), shared)
        for name, part in zip(tied.names, rows, strict=True)
    }
