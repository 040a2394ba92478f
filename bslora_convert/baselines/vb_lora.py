"""VB-LoRA (arXiv 2405.15179): every piece of every factor is a mixture of two vectors of one bank.

    A_m row p, piece q  (b,)  = Σ_{t in top-2} softmax(logits)_t bank[t]        in_m / b pieces, r rows
    B_m column p, piece q     likewise                                          out_m / b pieces, r columns
    ΔW_m = B_m A_m,  bank (h, b) shared by all modules, b divides every in and out, no scaling

Stored numbers, with S = Σ_m (in_m + out_m), so that there are r S / b pieces:

    h b + 3 r S / b        the bank; for each piece two indices and one share, the other being what is left of one

as PEFT's `save_only_topk_weights` keeps them. An index counts as one number like a share: two bytes beside bfloat16, exact for
banks of 256 to 32767 vectors (PEFT writes smaller ones in one byte). Training counts otherwise: all logits, h b + h r S / b, the
figure that the paper publishes; it is in the settings as `trained`.

b is the largest number up to 256 that divides every side. For a rank the bank takes what the budget leaves. Ranks tried: the
largest whose pieces each get a vector of their own, the next, half as much again, and the largest that there is, where the pieces
and vectors are few enough for it; what each gives from its starts chooses.

The fit has two stages:

    pieces     of the balanced truncated factors (B = U √σ, A = √σ Vᵀ), or of the source's own factors where the rank is theirs.
               A piece's error counts with ω = the squared length of the row or column that it is multiplied with, which is what
               it costs in ΔW to first order. Alternating least squares for mixtures and bank (`vector_bank`).
    updates    L-BFGS over bank and shares on the objective itself, the pairs fixed:

                   Σ_m ‖P Q − B A‖² = Σ_m ‖P Q‖² − 2 tr((PᵀB)ᵀ(Q Aᵀ)) + tr(BᵀB A Aᵀ)        r×r matrices only

What is handed on is always the best so far by that objective, so neither stage makes it worse. What the fit can't do: an adapter
that is in this form can be written with any other gauge (B M)(M⁻¹ A), whose pieces are no mixtures of anything; a planted bank is
found again from factors that are the mixtures, as trained VB-LoRA's are, not from arbitrary ones. Even then the choice of pairs
is combinatorial and the optimum found a local one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.baselines.baseline import Fitted, Made, OutOfReach, rounded
from bslora_convert.baselines.peft_files import save_peft
from bslora_convert.baselines.vb_pieces import TOPK, PieceLayout, saved, vector_length
from bslora_convert.baselines.vector_bank import Mixing, assign, exchanged, starts, update_bank
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import Factors, Shape

LARGEST_SEARCH = 1 << 26  # pieces times vectors up to which the source's own rank is tried
ROUNDS = 6  # of alternation, at most
TOLERANCE = 1e-2  # share of the objective that a round must take off it to be followed by another
REFINEMENTS = 30  # L-BFGS steps over bank and shares
FLOOR = 1e-12  # of the energy: below it the objective is rounding


@dataclass(frozen=True, slots=True)
class BankState:
    """A bank and its mixtures, float64, and the objective."""

    layout: PieceLayout
    bank: Tensor
    mixing: Mixing
    lost: float


@dataclass(frozen=True, slots=True)
class Task:
    """The pieces (n, b) of one rank, float32, with what an error of each costs (n,)."""

    layout: PieceLayout
    x: Tensor
    weights: Tensor
    size: int


@dataclass(frozen=True, slots=True)
class ModuleBatch:
    """Modules of one shape and inner rank, by their positions: P (m, out, R), Q (m, R, in), float64."""

    places: Sequence[int]
    p: Tensor
    q: Tensor


def fit_vb_lora(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """A bank for all modules and two of its vectors for every piece of their factors.

    :raises OutOfReach: when the sides have no common divisor of use, or two vectors and rank 1 are more than the budget.
    """
    shapes = source.shapes
    length = vector_length(shapes)
    batches = _batches(source)
    best = None
    for task in _tasks(source, budget, length):
        for bank in starts(task.x, task.weights, task.size, seed):
            mixing, _ = assign(task.x, bank, None)
            bank = update_bank(task.x, task.weights, mixing, bank)
            state = _state(source.energy, batches, task.layout, bank, mixing)
            if best is None or state.lost < best[1].lost:
                best = task, state
    assert best is not None  # there is one task at least, and one start of each
    task, state = best
    further = _alternate(source.energy, batches, task, state.bank.to(task.x), state.mixing)
    state = min(state, further, key=lambda one: one.lost)
    state = _refine(source.energy, batches, state)
    return _fitted(source, state, storage)


def vb_parameters(shapes: Mapping[str, Shape], rank: int, length: int, size: int) -> int:
    """Stored numbers: bank, two indices and one share for each piece."""
    return size * length + (2 * TOPK - 1) * _pieces(shapes, rank, length)


def vb_trained(shapes: Mapping[str, Shape], rank: int, length: int, size: int) -> int:
    """Numbers that training updates, bank and all logits: the count that the paper publishes."""
    return size * length + size * _pieces(shapes, rank, length)


def _pieces(shapes: Mapping[str, Shape], rank: int, length: int) -> int:
    return rank * sum(sum(shape) for shape in shapes.values()) // length


def _tasks(source: Source, budget: int, length: int) -> list[Task]:
    """The ranks that are tried, each with the bank that the budget leaves it (module docstring).

    :raises OutOfReach: when two vectors and rank 1 are more than the budget.
    """
    shapes = source.shapes
    least = vb_parameters(shapes, 1, length, TOPK)
    if least > budget:
        raise OutOfReach(f"VB-LoRA needs {least} numbers at least, the budget is {budget}")
    inner = {delta.rank for delta in source.deltas.values()}
    sizes = {
        rank: (budget - vb_parameters(shapes, rank, length, 0)) // length
        for rank in range(1, max(inner) + 1)
        if vb_parameters(shapes, rank, length, TOPK) <= budget
    }
    exact = max((rank for rank, size in sizes.items() if _pieces(shapes, rank, length) <= size), default=1)
    whole = max(sizes)
    ranks = {exact, exact + 1, math.ceil(1.5 * (exact + 1))} & set(sizes)
    if _pieces(shapes, whole, length) * sizes[whole] <= LARGEST_SEARCH:
        ranks.add(whole)
    tasks = []
    for rank in sorted(ranks):
        layout = PieceLayout(shapes, rank, length)
        size = max(min(sizes[rank], _pieces(shapes, rank, length) + 1), TOPK)
        factors = {name: delta.factors() for name, delta in source.deltas.items()}
        short = [source.svds[name].truncate([term], rank) for name, term in factors.items()]
        tasks.append(_task(layout, short, size))
        if inner == {rank} and rank == whole:
            tasks.append(_task(layout, list(factors.values()), size))
    return tasks


def _task(layout: PieceLayout, factors: Sequence[Factors], size: int) -> Task:
    x = torch.cat([layout.pieces(pair) for pair in factors])
    return Task(layout, x, torch.cat([layout.costs(pair) for pair in factors]), size)


def _batches(source: Source) -> list[ModuleBatch]:
    places: dict[tuple[Shape, int], list[int]] = {}
    deltas = list(source.deltas.values())
    for place, delta in enumerate(deltas):
        places.setdefault((delta.shape, delta.rank), []).append(place)
    batches = []
    for members in places.values():
        factors = [deltas[place].factors() for place in members]
        p, q = (torch.stack([getattr(pair, side) for pair in factors]).double() for side in ("b", "a"))
        batches.append(ModuleBatch(members, p, q))
    return batches


def _lost(energy: float, batches: Sequence[ModuleBatch], pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Σ ‖ΔW − BA‖², a float64 scalar that gradients pass through."""
    total = torch.as_tensor(energy, dtype=torch.float64, device=batches[0].p.device)
    for batch in batches:
        b = torch.stack([pairs[place][0] for place in batch.places])
        a = torch.stack([pairs[place][1] for place in batch.places])
        cross = (batch.p.mT @ b) * (batch.q @ a.mT)
        own = (b.mT @ b) * (a @ a.mT)
        total = total - 2 * cross.sum() + own.sum()
    return total


def _state(
    energy: float, batches: Sequence[ModuleBatch], layout: PieceLayout, bank: Tensor, mixing: Mixing
) -> BankState:
    bank = bank.double()
    mixing = Mixing(mixing.first, mixing.second, mixing.share.double())
    lost = float(_lost(energy, batches, layout.joined(mixing.of(bank))))
    return BankState(layout, bank, mixing, lost)


def _alternate(energy: float, batches: Sequence[ModuleBatch], task: Task, bank: Tensor, held: Mixing) -> BankState:
    """Rounds of bank and mixtures on the pieces, until one gains too little even with some of the bank exchanged."""
    x, weights = task.x, task.weights
    mixing, left = assign(x, bank, Mixing(held.first, held.second, held.share.to(bank)))
    lost = float((weights * left).double().sum())
    floor = FLOOR * float((weights * x.square().sum(1)).double().sum())
    for _ in range(ROUNDS):
        before = lost
        for exchange in (False, True):
            trial, new_mixing = bank, mixing
            if exchange:
                trial = exchanged(x, weights, mixing, bank, left)
                new_mixing, _ = assign(x, trial, mixing)
            new_bank = update_bank(x, weights, new_mixing, trial)
            new_mixing, new_left = assign(x, new_bank, new_mixing)
            new_lost = float((weights * new_left).double().sum())
            if new_lost < lost:
                bank, mixing, left, lost = new_bank, new_mixing, new_left, new_lost
        if lost <= floor or before - lost < TOLERANCE * lost:
            break
    return _state(energy, batches, task.layout, bank, mixing)


def _refine(energy: float, batches: Sequence[ModuleBatch], state: BankState) -> BankState:
    """L-BFGS over bank and shares, the pairs fixed; the state as it was where that doesn't help."""
    if state.lost <= FLOOR * energy:
        return state
    bank = state.bank.clone().requires_grad_()
    share = state.mixing.share.clone().requires_grad_()
    steps = torch.optim.LBFGS([bank, share], max_iter=REFINEMENTS, history_size=10, line_search_fn="strong_wolfe",
                              tolerance_grad=0.0, tolerance_change=0.0)  # fmt: skip

    def mixed() -> Mixing:
        return Mixing(state.mixing.first, state.mixing.second, share.clamp(0, 1))

    def objective() -> Tensor:
        steps.zero_grad()
        lost = _lost(energy, batches, state.layout.joined(mixed().of(bank))) / energy
        lost.backward()
        return lost

    steps.step(objective)
    with torch.no_grad():
        refined = _state(energy, batches, state.layout, bank.detach(), mixed())
    return min(state, refined, key=lambda one: one.lost)


def _fitted(source: Source, state: BankState, storage: torch.dtype) -> Fitted:
    layout, shapes = state.layout, source.shapes
    mixing = state.mixing.larger_first()
    bank = rounded(state.bank, storage)
    mixing = Mixing(mixing.first, mixing.second, rounded(mixing.share, storage))
    size = len(bank)
    rows = [first + second for first, second in layout.counts]
    stored = {
        name: Mixing(*parts)
        for name, *parts in zip(
            shapes, *(part.split(rows) for part in (mixing.first, mixing.second, mixing.share)), strict=True
        )
    }

    def make(name: str) -> Factors:
        ((b, a),) = PieceLayout({name: shapes[name]}, layout.rank, layout.length).joined(stored[name].of(bank))
        return Factors(b, a)

    def save(directory: Path, config: Mapping[str, Any]) -> None:
        """A PEFT VB-LoRA adapter; shares stand in float32, the only dtype that PEFT reads them in."""
        own = {
            "peft_type": "VBLORA",
            "r": layout.rank,
            "num_vectors": size,
            "vector_length": layout.length,
            "topk": TOPK,
            "save_only_topk_weights": True,
            "target_modules": list(shapes),
            "vblora_dropout": 0.0,
        }
        tensors = {"base_model.vblora_vector_bank": bank.to(storage)}
        for name, kept in stored.items():
            tensors |= saved(name, shapes[name], kept, layout, size)
        save_peft(directory, config, own, tensors)

    settings = {
        "rank": layout.rank,
        "vectors": size,
        "length": layout.length,
        "trained_numbers": vb_trained(shapes, layout.rank, layout.length, size),
    }
    linear = all(source.kind(name) == "linear" for name in shapes)  # PEFT's VB-LoRA has no embeddings
    stored_numbers = vb_parameters(shapes, layout.rank, layout.length, size)
    return Fitted(Made(list(shapes), make), stored_numbers, settings, save if linear else None)
