"""Slices and Kronecker blocks: shared ranks and local ranks by alternating fits.

A fit starts from the local parts; where the shared parts then earn more than their numbers would as local ranks, it also
starts from the shared parts and keeps the better. The search for shared ranks starts from the least ranks allowed and doubles
one level's rank at a time for as long as that lowers the error at the same total size. Growing keeps what the smaller parts have
learnt, which may be what another level should hold; so where sharing earned more than the least ranks, it then starts afresh at
those ranks and at their neighbours (a level doubled, halved, or one doubled and the other halved) until none is better.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from bslora_convert.bslora.counts import own_parameters, pair_parameters
from bslora_convert.bslora.form import LEVELS, BsloraForm, Module, Path
from bslora_convert.bslora.transforms import Kronecker, Slice
from bslora_convert.errors import RecipeError
from bslora_convert.fit.alternate import Allocation, Problem, State, fit_locals, local_factors, sweep
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Fit, Source, handed_over, local_most, too_small, within
from bslora_convert.modules.factors import Factors
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.structure import Structure

TOLERANCE = 1e-3  # relative fall of the objective under which sweeps stop
FLOOR = 1e-12  # share of the energy under which the objective is rounding
SWEEPS = 60
TRIAL_SWEEPS = 2
CAUTION = 4.0  # the headroom is measured with kernels that don't yet fit the larger rank
LARGEST_SHARED_RANK = 64


def problem_of(source: Source, structure: Structure) -> Problem:
    """The adapter with the transform that the structure names, sized for its shapes."""
    groups = source.groups
    shapes = [source.shapes[name] for name in source.sharing]
    transform: Kronecker | Slice
    if structure.transform == "ke":
        transform = Kronecker.dividing(shapes, structure.shared_size)
    else:
        transform = Slice.covering(shapes, structure.slice)
    return Problem(
        source.deltas, source.grams, source.svds, transform, source.costs, groups, structure.kernel, source.part
    )


def shared_parameters(problem: Problem, levels: Mapping[str, int]) -> int:
    """Numbers that the shared pairs and the modules' kernels store at these ranks."""
    total = 0
    for level, rank in levels.items():
        if rank:
            pair_rank, kernel_rank = problem.split(rank)
            for members in problem.groups[level].values():
                borne = problem.part if level == "inter" else 1.0
                total += math.ceil(borne * pair_parameters(problem.transform, pair_rank))
                total += sum(
                    own_parameters(problem.transform, problem.deltas[name].shape, kernel_rank) for name in members
                )
    return total


@dataclass(frozen=True, slots=True)
class Found:
    """Ranks of the levels, the fit at them, and its objective after each sweep."""

    levels: Mapping[str, int]
    state: State
    history: list[float]


def search(
    source: Source, structure: Structure, budget: int, seed: int, storage: torch.dtype | None, progress: Progress
) -> Fit:
    """Shared ranks and local ranks of lowest error at `budget`."""
    problem = problem_of(source, structure)
    limit = min(LARGEST_SHARED_RANK, *problem.transform.pair_sizes)
    most = math.inf if structure.most_rank is None else structure.most_rank

    def allocation_for(levels: Mapping[str, int]) -> Allocation | None:
        rest, shared = budget - shared_parameters(problem, levels), sum(levels.values())
        if rest < 0 or max(levels.values()) > limit or shared > most:
            return None
        return within(source, rest, structure, shared)

    least = dict.fromkeys(LEVELS, structure.min_shared or 0)
    local_most(source, structure.most_rank, sum(least.values()))  # says so where not even these fit
    allocation = allocation_for(least)
    if allocation is None:
        raise too_small(budget, source, shared_parameters(problem, least), structure.transform)
    found = Found(least, *fit_at(problem, least, allocation, seed, progress))
    found = _grown(problem, found, allocation_for, seed, progress)
    if found.levels != least:
        found = _moved(problem, found, allocation_for, structure.min_shared or 0, seed, progress)
    return finish(problem, source, storage, found.state, found.history)


def _grown(
    problem: Problem,
    found: Found,
    allocation_for: Callable[[Mapping[str, int]], Allocation | None],
    seed: int,
    progress: Progress,
) -> Found:
    """One level's rank doubled at a time, going on from the fit so far, for as long as the error falls."""
    improved = True
    while improved:
        improved = False
        for level in LEVELS:
            levels, state = found.levels, found.state
            larger = {**levels, level: max(1, 2 * levels[level])}
            allocation = allocation_for(larger)
            if allocation is None or _hopeless(problem, state, level, levels, larger):
                continue
            progress(_phase(problem), words=f"trying ranks {larger['intra']} within layers, {larger['inter']} across")
            trial = _run(problem, state, larger, allocation, seed, TRIAL_SWEEPS)[0]
            if not levels[level] and trial.lost >= state.lost:
                trial = _run(problem, State(math.inf), larger, allocation, seed, TRIAL_SWEEPS)[0]
            if trial.lost < state.lost * (1 - TOLERANCE):
                found = Found(larger, *_run(problem, trial, larger, allocation, seed, SWEEPS))
                improved = True
    return found


def _moved(
    problem: Problem,
    found: Found,
    allocation_for: Callable[[Mapping[str, int]], Allocation | None],
    least: int,
    seed: int,
    progress: Progress,
) -> Found:
    """Afresh, shared parts first, at the ranks found and from neighbour to neighbour while one is better."""
    tried = []
    untried = [found.levels]
    while untried:
        levels = untried.pop(0)
        tried.append(levels)
        allocation = allocation_for(levels)
        if allocation is None:
            continue
        progress(
            _phase(problem), words=f"starting afresh at ranks {levels['intra']} within layers, {levels['inter']} across"
        )
        fresh, early = _run(problem, State(math.inf), levels, allocation, seed, TRIAL_SWEEPS)
        if levels != found.levels and fresh.lost >= found.state.lost:
            continue
        fresh, late = _run(problem, fresh, levels, allocation, seed, SWEEPS, progress)
        if fresh.lost < found.state.lost:
            found = Found(levels, fresh, early + late)
        if levels == found.levels:
            untried = [ranks for ranks in _neighbours(levels, least) if ranks not in tried]
    return found


def _neighbours(levels: Mapping[str, int], least: int) -> list[dict[str, int]]:
    """Ranks one step away: a level doubled, halved, or one doubled and the other halved."""
    steps = [(2, 1), (1, 2), (2, 0.5), (0.5, 2), (0.5, 1), (1, 0.5)]
    found = []
    for step in steps:
        moved = {level: math.floor(rank * factor) for (level, rank), factor in zip(levels.items(), step, strict=True)}
        if min(moved.values()) >= least and moved != levels:
            found.append(moved)
    return found


def _hopeless(problem: Problem, state: State, level: str, levels: Mapping[str, int], larger: Mapping[str, int]) -> bool:
    """Whether a larger rank can't earn, by far, what its numbers would earn as local components."""
    headroom = sum(value for (at, _), value in state.headroom.items() if at == level) if levels[level] else math.inf
    added = shared_parameters(problem, larger) - shared_parameters(problem, levels)
    return CAUTION * headroom < state.price * added


def fit_at(
    problem: Problem, levels: Mapping[str, int], allocation: Allocation, seed: int, progress: Progress
) -> tuple[State, list[float]]:
    """Sweeps from the local parts, or from the shared parts where those carry more, until the objective settles."""
    for level, rank in levels.items():
        if problem.split(rank)[0] > min(problem.transform.pair_sizes):
            raise RecipeError(
                f"ranks: {level} rank {rank} is larger than the shared size {min(problem.transform.pair_sizes)}",
                "ranks",
            )
    state = fit_locals(problem, State(math.inf), allocation)
    if not any(levels.values()):
        return state, [state.lost]
    progress(_phase(problem), words="starting the shared parts")
    plain = state
    state, history = _run(problem, plain, levels, allocation, seed, 1)
    if plain.lost - state.lost > plain.price * shared_parameters(problem, levels):
        # Sharing earns its numbers here, so it may earn more if it chooses before the local parts do.
        fresh, fresh_history = _run(problem, State(math.inf), levels, allocation, seed, 1)
        if fresh.lost < state.lost:
            state, history = fresh, fresh_history
    elif _settled(plain.lost, state.lost):
        return state, history
    state, more = _run(problem, state, levels, allocation, seed, SWEEPS, progress)
    return state, history + more


def _run(
    problem: Problem,
    state: State,
    levels: Mapping[str, int],
    allocation: Allocation,
    seed: int,
    sweeps: int,
    progress: Progress = silent,
) -> tuple[State, list[float]]:
    """Up to `sweeps` sweeps; stops when the objective settles."""
    generator = torch.Generator().manual_seed(seed)
    energy = sum(grams.energy for grams in problem.grams.values())
    history = []
    for number in range(1, sweeps + 1):
        before = state.lost
        state = sweep(problem, state, levels, allocation, generator)
        history.append(state.lost)
        progress(_phase(problem), words=f"sweep {number}, error {math.sqrt(state.lost / energy) if energy else 0:.4f}")
        if _settled(before, state.lost) or state.lost <= FLOOR * energy:
            break
    return state, history


def _phase(problem: Problem) -> str:
    return f"fitting {problem.transform.name}"


def _settled(before: float, after: float) -> bool:
    """Whether a sweep changed too little for another one."""
    return before - after <= TOLERANCE * after


def finish(problem: Problem, source: Source, storage: torch.dtype | None, state: State, history: list[float]) -> Fit:
    """The form of a state, its local parts multiplied out."""

    def module(name: str) -> Module:
        delta = source.deltas[name]
        paths = {level: Path(*state.uses[level, name]) for level in LEVELS if (level, name) in state.uses}
        return Module(delta.shape, handed_over(local_factors(problem, state, name), storage), paths, source.kind(name))

    modules = dict(zip(source.deltas, each(module, source.deltas), strict=True))
    shared: dict[str, dict[str, Factors]] = {}
    for (level, group), pair in state.pairs.items():
        shared.setdefault(level, {})[group] = pair
    return Fit(BsloraForm(problem.transform if shared else None, modules, shared), state.lost, tuple(history))
