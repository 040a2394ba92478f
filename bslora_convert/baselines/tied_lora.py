"""Tied-LoRA (arXiv 2311.09578): one pair of factors for a kind of module in all layers, scaled a little in each.

With i a layer, k a kind of module of L layers, p the rank:

    TL5    ΔW_ik = B_k A_k                              Σ_k p (in + out) numbers
    TL6    ΔW_ik = diag(v_ik) B_k diag(u_ik) A_k        beside them Σ_k L (out + p);  v (out,), u (p,)

TL5 is ShareLoRA's AB under another name, its fit the same closed form (`sharelora`).

TL6 is fitted by alternation, each step the exact least-squares optimum of what it updates, for ΔW_i = P_i Q_i with P_i (out, R),
Q_i (R, in). With C_i = Q_i Aᵀ (R, p), G = A Aᵀ, and ∘ the product entry by entry:

    row o of B    (G ∘ Σ_i v_io² u_i u_iᵀ) b_o = Σ_i v_io u_i ∘ (C_iᵀ P_i[o])                       p×p for each row
    with X_i = diag(v_i) B, W_i = X_iᵀX_i, Z_i = X_iᵀP_i (p, R):
    A             (Σ_i u_i u_iᵀ ∘ W_i) A = Σ_i diag(u_i) Z_i Q_i                                    one p×p system
    u_i           (W_i ∘ G) u_i = diag(Z_i C_i)                                                     p×p for each layer
    v_io          ⟨P_i[o] C_i, u_i ∘ b_o⟩ / (u_i ∘ b_o)ᵀ G (u_i ∘ b_o)                              a number

The systems are solved for the change, with a ridge of rounding size on it, so a singular one leaves alone what it doesn't
determine and no step raises the objective. Sweeps start ahead (`strides`). The problem has local optima: factors planted with
u and v around one, where they start in training, are mostly found again, those with u and v of any sign often not. Two starts
run for a few sweeps and the better goes on:

    mean      B A = the truncated mean update, u = v = 1
    stacked   A from ShareA's closed form, and for each of its components u_it b_t = the best rank-1 fit of the L columns, v = 1
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from bslora_convert.baselines.baseline import Fitted, Made, kinds, largest, rounded
from bslora_convert.baselines.proximal import toward_optimum
from bslora_convert.baselines.sharelora import mean_pair, mean_svd, sharelora_ab
from bslora_convert.baselines.strides import best_of
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import Grams, gram, product_svd

SWEEPS = 200
TRIAL_SWEEPS = 5  # of each start
CHUNK = 1 << 22  # numbers of the rows' systems that stand in memory together


@dataclass(frozen=True, slots=True)
class Targets:
    """Updates P_i Q_i of one kind: p (L, out, R), q (L, R, in), float64; smaller ranks are padded with zeros."""

    p: Tensor
    q: Tensor
    energy: float


@dataclass(frozen=True, slots=True)
class Tl6:
    """One kind in the form TL6: b (out, p), a (p, in), u (L, p), v (L, out)."""

    b: Tensor
    a: Tensor
    u: Tensor
    v: Tensor

    def beyond(self, before: "Tl6", stride: float) -> "Tl6":
        """A point on the line from `before` through this one, `stride` of their distance further on."""
        pairs = zip((self.b, self.a, self.u, self.v), (before.b, before.a, before.u, before.v), strict=True)
        return Tl6(*(now + stride * (now - then) for now, then in pairs))

    def balanced(self) -> "Tl6":
        """The same updates with u and v of mean square one, B's columns as long as A's rows."""

        def safe(scale: Tensor) -> Tensor:
            return torch.where(scale > 0, scale, torch.ones_like(scale))

        of_v = safe(self.v.square().mean(1, keepdim=True).sqrt())
        u = self.u * of_v
        of_u = safe(u.square().mean(0).sqrt())
        b = self.b * of_u
        ratio = safe((b.norm(dim=0) / safe(self.a.norm(dim=1))).sqrt())
        return Tl6(b / ratio, self.a * ratio[:, None], u / of_u, self.v / of_v)

    def stored(self, storage: torch.dtype) -> "Tl6":
        """As it comes back from a file."""
        return Tl6(*(rounded(tensor, storage) for tensor in (self.b, self.a, self.u, self.v)))

    def delta(self, layer: int) -> Factors:
        """One layer's update, factors (out, p), (p, in)."""
        return Factors(self.v[layer, :, None] * self.b * self.u[layer], self.a)


def tied_lora_tl5(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """A and B tied over layers: what `sharelora_ab` fits.

    :raises OutOfReach: when rank 1 is more than the budget.
    """
    return sharelora_ab(source, budget, storage, seed)


def tied_lora_tl6(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """A and B tied over layers, scaled by vectors of every layer's own.

    :raises OutOfReach: when rank 1 is more than the budget.
    """
    groups = kinds(source)
    limits = [min(*shape, sum(source.deltas[n].rank for n in names)) for (_, shape), names in groups.items()]
    sizes = [(shape, len(names)) for (_, shape), names in groups.items()]

    def cost(rank: int) -> int:
        return sum(tl6_parameters(*size, min(rank, limit)) for size, limit in zip(sizes, limits, strict=True))

    rank = largest(cost, budget, max(limits), "Tied-LoRA TL6")

    def fitted(task: tuple[Sequence[str], int]) -> Tl6:
        names, limit = task
        form, _ = fit_tl6([source.deltas[name].factors() for name in names], min(rank, limit))
        return form.balanced().stored(storage)

    forms = each(fitted, zip(groups.values(), limits, strict=True))
    places: dict[str, tuple[Tl6, int]] = {}
    for names, form in zip(groups.values(), forms, strict=True):
        places |= {name: (form, layer) for layer, name in enumerate(names)}

    def make(name: str) -> Factors:
        form, layer = places[name]
        return form.delta(layer)

    return Fitted(Made(list(source.deltas), make), cost(rank), {"rank": rank})


def tl6_parameters(shape: Shape, layers: int, rank: int) -> int:
    """Numbers that TL6 stores for one kind."""
    return rank * sum(shape) + layers * (shape[0] + rank)


def fit_tl6(terms: Sequence[Factors], rank: int) -> tuple[Tl6, list[float]]:
    """The best TL6 form of one kind that was found, and the objective after each of its sweeps (module docstring).

    terms: the layers' updates, factors (out, R_i), (R_i, in).
    """
    targets = _targets(terms)
    starts = _mean(terms, rank), _stacked(terms, rank)
    return best_of(starts, partial(_sweep, targets), targets.energy, TRIAL_SWEEPS, SWEEPS)


def _targets(terms: Sequence[Factors]) -> Targets:
    inner = max(term.rank for term in terms)
    pad = torch.nn.functional.pad
    p = torch.stack([pad(term.b.double(), (0, inner - term.rank)) for term in terms])
    q = torch.stack([pad(term.a.double(), (0, 0, 0, inner - term.rank)) for term in terms])
    return Targets(p, q, sum(Grams.of(term).energy for term in terms))


def _mean(terms: Sequence[Factors], rank: int) -> Tl6:
    named = {str(layer): term for layer, term in enumerate(terms)}
    pair = mean_pair(named, mean_svd(named, list(named)), rank).to(torch.float64)
    missing = rank - pair.rank
    b = torch.nn.functional.pad(pair.b, (0, missing))
    a = torch.nn.functional.pad(pair.a, (0, 0, 0, missing))
    return Tl6(b, a, b.new_ones((len(terms), rank)), b.new_ones((len(terms), len(b))))


def _stacked(terms: Sequence[Factors], rank: int) -> Tl6:
    left = torch.block_diag(*(gram(term.b) for term in terms))
    rows = torch.cat([term.a.double() for term in terms])
    onto, back = product_svd(Grams(left, gram(rows.T))).balanced(rank)
    pieces = onto.split([term.rank for term in terms])
    columns = torch.stack([term.b.double() @ piece for term, piece in zip(terms, pieces, strict=True)])  # (L, out, q)
    missing = rank - back.shape[0]
    columns = torch.nn.functional.pad(columns, (0, missing))
    a = torch.nn.functional.pad(back @ rows, (0, 0, 0, missing))
    small = torch.einsum("lot,mot->tlm", columns, columns)
    u = torch.linalg.eigh(small)[1][:, :, -1].T  # (L, p), unit columns: the leading direction over layers
    b = torch.einsum("lot,lt->ot", columns, u)
    return Tl6(b, a, u, b.new_ones((len(terms), len(b))))


def _sweep(targets: Targets, form: Tl6) -> tuple[Tl6, float]:
    """B, A, u, v, each at its optimum given the rest, and the objective then."""
    u, v, p = form.u, form.v, targets.p
    b = _rows(targets, form)
    scaled = [b * v_i[:, None] for v_i in v]
    w = torch.stack([x.T @ x for x in scaled])  # (L, p, p)
    z = torch.stack([x.T @ p_i for x, p_i in zip(scaled, p, strict=True)])  # (L, p, R)
    normal = torch.einsum("lt,ls,lts->ts", u, u, w)
    a = toward_optimum(normal, torch.einsum("lt,ltr,lri->ti", u, z, targets.q), form.a)
    c, g = targets.q @ a.T, a @ a.T
    u = toward_optimum(w * g, torch.einsum("ltr,lrt->lt", z, c)[..., None], u[..., None])[..., 0]
    lost = targets.energy
    new = []
    for p_i, c_i, u_i, v_i in zip(p, c, u, v, strict=True):
        x = b * u_i
        weight = ((x @ g) * x).sum(1)
        right = ((p_i @ c_i) * x).sum(1)
        best = torch.where(weight > 0, right / torch.where(weight > 0, weight, 1.0), v_i)
        lost -= float((2 * right * best - weight * best.square()).sum())
        new.append(best)
    return Tl6(b, a, u, torch.stack(new)), max(lost, 0.0)


def _rows(targets: Targets, form: Tl6) -> Tensor:
    """The rows of B, some at a time: (out, p)."""
    c, g = targets.q @ form.a.T, form.a @ form.a.T
    rank = len(g)
    right = torch.zeros_like(form.b)
    for p_i, c_i, u_i, v_i in zip(targets.p, c, form.u, form.v, strict=True):
        right += v_i[:, None] * (p_i @ c_i) * u_i
    outer = torch.einsum("lt,ls->lts", form.u, form.u).flatten(1)  # (L, p²)
    size = max(CHUNK // rank**2, 1)
    rows = []
    for squares, wanted, old in zip(form.v.T.square().split(size), right.split(size), form.b.split(size), strict=True):
        normal = (squares @ outer).view(-1, rank, rank) * g
        rows.append(toward_optimum(normal, wanted[..., None], old[..., None])[..., 0])
    return torch.cat(rows)
