"""Alternating closed-form updates of the whole form.

    min Σ_m ‖ΔW_m − L_m − T_m(S_layer) − T_m(S_all)‖²_F

One sweep updates the inter group, each intra group and all local parts, in this order, each the exact optimum given the
rest: a group by `shared.update`, the local parts as truncated SVDs of what the shared parts leave, their ranks chosen anew
from the residual's spectra and kept only where that loses less. The objective never rises.

A residual is never formed, nor is a local part before the end: with L = [B −T] C [A; T], C small, ΔW_m − L_m − T_m is
[B T] core [A; T] with another small core (`residual.Sum`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from bslora_convert.bslora.form import LEVELS
from bslora_convert.bslora.transforms import Kronecker, Slice
from bslora_convert.bslora.transforms.kronecker import split_rank
from bslora_convert.fit import shared
from bslora_convert.fit.allocate import Ranks, cost_of, lost_energy
from bslora_convert.fit.beginning import widen
from bslora_convert.fit.parallel import each
from bslora_convert.fit.residual import Member, Own, Sum
from bslora_convert.modules.factors import Factors, add
from bslora_convert.modules.lowrank import Delta, Grams, ProductSvd, combine, gram, product_svd

Allocation = Callable[[Mapping[str, Tensor]], Ranks]
Pairs = Mapping[tuple[str, str], Factors]  # (level, group) -> shared pair
Uses = Mapping[tuple[str, str], tuple[str, Own]]  # (level, module) -> (group, the module's own tensors)
Groups = Mapping[str, Mapping[str, list[str]]]


@dataclass(frozen=True, slots=True)
class Problem:
    """What is fitted: the deltas with their Gram matrices and SVDs, and who shares with whom.

    costs: numbers that one more local rank of a module stores. groups: level -> group -> names of its members.
    kernel: the KE variant. part: which share of the cost of what all layers share these modules bear (`Source.part`).
    """

    deltas: Mapping[str, Delta]
    grams: Mapping[str, Grams]
    svds: Mapping[str, ProductSvd]
    transform: Kronecker | Slice
    costs: Mapping[str, int]
    groups: Groups
    kernel: str = "r_1"
    part: float = 1.0

    def split(self, rank: int) -> tuple[int, int]:
        """(pair rank p, kernel rank k) of a shared path of this rank."""
        return split_rank(self.kernel, rank) if isinstance(self.transform, Kronecker) else (rank, 1)


@dataclass(frozen=True, slots=True)
class LocalPart:
    """A module's local part as the truncated SVD that it is, not yet multiplied out: [B −T] left right [A; T].

    left (q, k), right (k, q), balanced. T: the shared terms of `pairs` and `uses`, those of the time of the fit.
    """

    left: Tensor
    right: Tensor
    pairs: Pairs
    uses: Uses

    @property
    def rank(self) -> int:
        """LocalPart rank k."""
        return self.left.shape[1]


@dataclass(frozen=True, slots=True)
class State:
    """A fit so far. `lost` is the objective Σ ‖residual‖².

    pairs: (level, group) -> shared pair. uses: (level, module) -> (group, own tensors).
    headroom: (level, group) -> energy that twice the rank would take (`shared.Update`).
    price: energy per number that the next local component would take.
    """

    lost: float
    locals: Mapping[str, LocalPart] = field(default_factory=dict)
    pairs: Pairs = field(default_factory=dict)
    uses: Uses = field(default_factory=dict)
    headroom: Mapping[tuple[str, str], float] = field(default_factory=dict)
    price: float = 0.0

    def own(self, level: str, name: str) -> Own:
        """A module's own tensors of a level, none before its group has been started."""
        return self.uses[level, name][1] if (level, name) in self.uses else {}


def sweep(
    problem: Problem,
    state: State,
    ranks: Mapping[str, int],
    allocation: Allocation,
    generator: torch.Generator,
) -> State:
    """One round over inter, intra and local parts; starts groups that are new and widens those whose rank grew."""
    for level in reversed(LEVELS):
        if ranks[level]:
            for group, names in problem.groups[level].items():
                state = _update_group(problem, state, level, group, names, ranks[level], generator)
    return fit_locals(problem, state, allocation)


def _shared_terms(problem: Problem, pairs: Pairs, uses: Uses, name: str, skip: str | None = None) -> list[Factors]:
    """A module's shared terms, but for the level `skip`."""
    terms = []
    for level in LEVELS:
        if level != skip and (level, name) in uses:
            group, own = uses[level, name]
            terms.append(problem.transform.factors(pairs[level, group], own, problem.deltas[name].shape))
    return terms


def _residual(problem: Problem, state: State, level: str, name: str) -> Sum:
    """ΔW_m minus everything but the module's term of `level`."""
    terms = [problem.deltas[name].factors()]
    signs = [torch.ones(terms[0].rank, dtype=torch.float64)]
    local = state.locals.get(name)
    if local is not None:
        # The basis of the local part: terms that may have moved since, present only through it.
        basis = _shared_terms(problem, local.pairs, local.uses, name)
        terms += basis
        signs += [torch.zeros(term.rank, dtype=torch.float64) for term in basis]
    others = _shared_terms(problem, state.pairs, state.uses, name, skip=level)
    terms += others
    signs += [-torch.ones(term.rank, dtype=torch.float64) for term in others]
    core = torch.diag(torch.cat(signs)).to(terms[0].b.device)
    if local is not None:
        q, sign = local.left.shape[0], torch.ones_like(local.left[:, :1])
        sign[terms[0].rank :] = -1  # the basis stands in the local part with a minus on its left factor
        core[:q, :q] -= (sign * local.left) @ local.right
    return Sum(terms, core.to(terms[0].b.dtype))


def _update_group(
    problem: Problem,
    state: State,
    level: str,
    group: str,
    names: list[str],
    rank: int,
    generator: torch.Generator,
) -> State:
    pair_rank, kernel_rank = problem.split(rank)
    members = [
        Member(
            problem.deltas[name].shape,
            state.own(level, name),
            partial(_residual, problem, state, level, name),
        )
        for name in names
    ]
    if (level, group) in state.pairs:
        pair = widen(state.pairs[level, group], pair_rank, generator)
        result = shared.update(problem.transform, members, pair, kernel_rank)
    else:
        result = shared.start(problem.transform, members, pair_rank, kernel_rank, generator)
    uses = {(level, name): (group, own) for name, own in zip(names, result.owns, strict=True)}
    return replace(
        state,
        pairs={**state.pairs, (level, group): result.pair},
        uses={**state.uses, **uses},
        headroom={**state.headroom, (level, group): result.headroom},
    )


def fit_locals(problem: Problem, state: State, allocation: Allocation) -> State:
    """LocalPart parts as truncated SVDs of ΔW_m minus its shared terms, ranks from the residual spectra."""

    def svd(name: str) -> ProductSvd:
        terms = _shared_terms(problem, state.pairs, state.uses, name)
        if not terms:
            return problem.svds[name]
        return product_svd(_without(problem.grams[name], problem.deltas[name], add(*terms)))

    svds = dict(zip(problem.grams, each(svd, problem.grams), strict=True))
    spectra = {name: svd.energies for name, svd in svds.items()}
    ranks = allocation(spectra)
    before = {name: state.locals[name].rank if name in state.locals else 0 for name in spectra}
    affordable = cost_of(before, problem.costs) <= cost_of(ranks, problem.costs)
    if affordable and lost_energy(spectra, before) < lost_energy(spectra, ranks):
        ranks = before
    local = {name: LocalPart(*svd.balanced(ranks[name]), state.pairs, state.uses) for name, svd in svds.items()}
    price = max(
        (float(v[ranks[name]]) / problem.costs[name] for name, v in spectra.items() if len(v) > ranks[name]),
        default=0.0,
    )
    return replace(state, locals=local, lost=lost_energy(spectra, ranks), price=price)


def local_factors(problem: Problem, state: State, name: str) -> Factors:
    """A module's local part, multiplied out: (out, k), (k, in)."""
    local = state.locals[name]
    terms = _shared_terms(problem, local.pairs, local.uses, name)
    return combine(
        [problem.deltas[name].factors(), *(Factors(-term.b, term.a) for term in terms)], local.left, local.right
    )


def _without(grams: Grams, target: Delta, term: Factors) -> Grams:
    """Gram matrices of [B −T_B] and [A; T_A], the target's own reused."""

    def bordered(corner: Tensor, cross: Tensor, new: Tensor) -> Tensor:
        return torch.cat([torch.cat([corner, cross], dim=1), torch.cat([cross.T, new], dim=1)])

    return Grams(
        bordered(grams.b, -target.scaling * gram(target.stored.b, term.b), gram(term.b)),
        bordered(grams.a, gram(target.stored.a.T, term.a.T), gram(term.a.T)),
        grams.dtype,
    )
