"""The fit of a whole adapter: the one place that knows the order of steps.

    measure    Gram matrices and spectra of every ΔW_m, once
    plain      truncated SVD, ranks uniform or adaptive                              transform none
    gated      truncated SVD with one or two components per module held by gates     transform gt
    alternated sweeps over inter, intra and local parts                              transforms ss, ke

A fit starts from the local parts; where the shared parts then earn more than their numbers would as local ranks, it also
starts from the shared parts and keeps the better. The search for shared ranks starts from the least ranks allowed and doubles
one level's rank at a time for as long as that lowers the error at the same total size.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bslora_convert.bslora.counts import own_parameters, pair_parameters
from bslora_convert.bslora.factors import Factors, Shape
from bslora_convert.bslora.form import LEVELS, BsloraForm, Module, Path, layer_of
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice
from bslora_convert.bslora.transforms.gate import DEFAULT_SIZE as GATE_SIZE
from bslora_convert.errors import RecipeError, ThresholdMissed
from bslora_convert.fit import allocate
from bslora_convert.fit.allocate import Ranks
from bslora_convert.fit.alternate import Allocation, Problem, State, fit_locals, local_factors, sweep
from bslora_convert.fit.lowrank import Delta, Grams, ProductSvd, product_svd

TOLERANCE = 1e-3  # relative fall of the objective under which sweeps stop
FLOOR = 1e-12  # share of the energy under which the objective is rounding
SWEEPS = 60
TRIAL_SWEEPS = 2
CAUTION = 4.0  # the headroom is measured with kernels that don't yet fit the larger rank
LARGEST_SHARED_RANK = 64
BISECTIONS = 12
ENTIRE = "all"  # the inter group's name

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Source:
    """The adapter as the fit sees it: deltas, their Gram matrices and their SVDs, by module name."""

    deltas: Mapping[str, Delta]
    kinds: Mapping[str, str]
    grams: Mapping[str, Grams]
    svds: Mapping[str, ProductSvd]

    @property
    def energy(self) -> float:
        """Σ ‖ΔW_m‖²."""
        return sum(grams.energy for grams in self.grams.values())

    @property
    def spectra(self) -> dict[str, Tensor]:
        """σ² of every module."""
        return {name: svd.energies for name, svd in self.svds.items()}

    @property
    def shapes(self) -> dict[str, Shape]:
        """(out, in) of every module."""
        return {name: delta.shape for name, delta in self.deltas.items()}

    @property
    def costs(self) -> dict[str, int]:
        """Numbers that one local rank of a module stores."""
        return {name: sum(shape) for name, shape in self.shapes.items()}

    @property
    def parameters(self) -> int:
        """Numbers that the LoRA stores."""
        return sum(delta.rank * sum(delta.shape) for delta in self.deltas.values())

    @property
    def groups(self) -> dict[str, dict[str, list[str]]]:
        """Who shares: modules of a numbered layer with their layer (intra) and all of them (inter)."""
        layers: dict[str, list[str]] = {}
        for name in self.deltas:
            layer = layer_of(name)
            if layer is not None and self.kinds.get(name, "linear") == "linear":
                layers.setdefault(layer, []).append(name)
        everyone = [name for members in layers.values() for name in members]
        return {"intra": layers, "inter": {ENTIRE: everyone} if everyone else {}}


@dataclass(frozen=True, slots=True)
class Options:
    """How to share: the transform's name and its own settings, and the least rank of each shared part."""

    transform: str = "ke"
    shared_size: int | None = None
    window: str = "center"
    kernel: str = "r_1"
    min_shared: int = 1
    uniform: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Fit:
    """A form and what it loses: Σ ‖ΔW − ΔŴ‖², in the fit's own precision; the objective after each sweep."""

    form: BsloraForm
    lost: float
    history: tuple[float, ...] = ()
    notes: tuple[str, ...] = field(default=())


def measure(deltas: Mapping[str, Delta], kinds: Mapping[str, str] | None = None) -> Source:
    """Gram matrices and SVDs of every module."""
    grams = {name: Grams.of(delta.factors()) for name, delta in deltas.items()}
    return Source(deltas, kinds or {}, grams, {name: product_svd(g) for name, g in grams.items()})


def _quiet(_: str) -> None:
    pass


def fit_to_budget(source: Source, options: Options, budget: int, progress: Progress = _quiet) -> Fit:
    """The form of lowest error that stores at most `budget` numbers.

    :raises RecipeError: when the least form of this transform stores more.
    """
    if options.transform == "auto":
        return _best(source, replace(options, min_shared=options.min_shared), budget, progress)
    if options.transform == "none" or not source.groups["inter"] or _may_drop_gates(options):
        return _plain(source, _within(source, budget, options.uniform))
    if options.transform == "gt":
        return _gated_to_budget(source, options, budget)
    return _search(source, options, budget, progress)


def fit_by_hand(source: Source, options: Options, ranks: tuple[int, int, int], progress: Progress = _quiet) -> Fit:
    """The form of the ranks (local, intra, inter); adaptive local ranks spread the same number of local numbers."""
    local, *level_ranks = ranks
    levels = dict(zip(LEVELS, level_ranks, strict=True))
    if options.uniform:

        def allocation(spectra: Mapping[str, Tensor]) -> Ranks:
            return {name: min(local, len(values)) for name, values in spectra.items()}
    else:
        numbers = local * sum(source.costs.values())

        def allocation(spectra: Mapping[str, Tensor]) -> Ranks:
            return allocate.within_budget(spectra, source.costs, numbers)

    if options.transform == "none" or not any(level_ranks) or not source.groups["inter"]:
        return _plain(source, allocation)
    if options.transform == "gt":
        return _gated_by_hand(source, options, levels, local)
    problem = _problem(source, options)
    return _finish(problem, source, *_fit_at(problem, levels, allocation, options.seed, progress))


def fit_to_error(source: Source, options: Options, error: float, progress: Progress = _quiet) -> Fit:
    """The smallest form found whose relative error is at most `error`.

    Without sharing the greedy order gives it directly; with sharing, bisection over budgets.

    :raises ThresholdMissed: when the transform can't reach the error at the size of the LoRA itself.
    """
    allowed = error**2 * source.energy

    def allocation(spectra: Mapping[str, Tensor]) -> Ranks:
        return allocate.within_energy(spectra, source.costs, allowed)

    plain = _plain(source, allocation)
    if options.transform == "none" or not source.groups["inter"] or _may_drop_gates(options):
        return plain
    low, high = 0, plain.form.parameters
    best = plain if options.transform == "auto" else None
    if best is None:
        high = source.parameters
        best = fit_to_budget(source, options, high, progress)
        if best.lost > allowed:
            raise ThresholdMissed(
                f"--max-error {error:g} can't be reached with --transform {options.transform} at the size of the "
                "LoRA itself; use --transform none or auto, or a larger error"
            )
        # Sharing gains little on most adapters, so the answer is near the plain one: bracket it from there.
        for factor in (0.5, 0.9, 1.02, 1.1):
            budget = int(plain.form.parameters * factor)
            trial = _try(source, options, budget, progress)
            if trial is not None and trial.lost <= allowed:
                best, high = trial, budget
                break
            low = budget
    for _ in range(BISECTIONS):
        if high - low <= max(min(source.costs.values()), high // 500):
            break
        middle = (low + high) // 2
        trial = _try(source, options, middle, progress)
        if trial is not None and trial.lost <= allowed:
            best, high = trial, middle
        else:
            low = middle
    return best


def _try(source: Source, options: Options, budget: int, progress: Progress) -> Fit | None:
    try:
        return fit_to_budget(source, options, budget, progress)
    except RecipeError:
        return None


def _may_drop_gates(options: Options) -> bool:
    """A gate costs more than the local rank that it equals, so a search that may drop gates drops them."""
    return options.transform == "gt" and options.min_shared == 0


def _best(source: Source, options: Options, budget: int, progress: Progress) -> Fit:
    """The lowest error over the transforms; the plain form where they tie. Gates never win (see `_may_drop_gates`)."""
    best = _plain(source, _within(source, budget, options.uniform))
    if not source.groups["inter"]:
        return best
    tried = ["none"]
    for name in ("ke", "ss"):
        try:
            size = options.shared_size if name == "ke" else None
            fit = _search(source, replace(options, transform=name, shared_size=size), budget, progress)
        except RecipeError:
            continue
        tried.append(name)
        if fit.lost < best.lost:
            best = fit
    note = f"auto compared {', '.join(tried)} at this size; gt equals none at more numbers and was left out"
    return replace(best, notes=(*best.notes, note))


def _within(source: Source, budget: int, equal: bool) -> Allocation:
    """Local ranks that store at most `budget` numbers."""

    def allocation(spectra: Mapping[str, Tensor]) -> Ranks:
        if equal:
            return allocate.uniform({name: len(v) for name, v in spectra.items()}, source.costs, budget)
        return allocate.within_budget(spectra, source.costs, budget)

    return allocation


# --- no sharing -----------------------------------------------------------------------------------------------


def _plain(source: Source, allocation: Allocation) -> Fit:
    ranks = allocation(source.spectra)
    modules = {
        name: Module(delta.shape, source.svds[name].truncate([delta.factors()], ranks[name]), {}, _kind(source, name))
        for name, delta in source.deltas.items()
    }
    return Fit(BsloraForm(None, modules), allocate.lost_energy(source.spectra, ranks))


def _kind(source: Source, name: str) -> str:
    return source.kinds.get(name, "linear")


# --- gates ----------------------------------------------------------------------------------------------------


def _gated_by_hand(source: Source, options: Options, levels: Mapping[str, int], local: int) -> Fit:
    transform = Gate(options.shared_size or GATE_SIZE)
    grouped = {name for members in source.groups["intra"].values() for name in members}
    gates = {name: sum(rank > 0 for rank in levels.values()) if name in grouped else 0 for name in source.deltas}
    if options.uniform:
        ranks = {name: min(local, len(values)) for name, values in source.spectra.items()}
    else:
        numbers = local * sum(source.costs.values())
        ranks = allocate.within_budget(source.spectra, source.costs, numbers, first=gates)
    return _gated(source, transform, levels, gates, ranks)


def _gated_to_budget(source: Source, options: Options, budget: int) -> Fit:
    """Gates first, the rest to local ranks; the shared size is halved until every gate fits, then gates are dropped."""
    levels = dict.fromkeys(LEVELS, max(options.min_shared, 1))
    members = source.groups["inter"][ENTIRE]
    pairs = sum(rank * len(source.groups[level]) for level, rank in levels.items())
    size = options.shared_size or GATE_SIZE

    def gate_costs(transform: Gate) -> dict[str, int]:
        return {name: own_parameters(transform, source.shapes[name]) for name in members}

    while options.shared_size is None and size > 1:
        if pairs * 2 * size + len(LEVELS) * sum(gate_costs(Gate(size)).values()) <= budget:
            break
        size //= 2
    transform = Gate(size)
    costs = gate_costs(transform)
    rest = budget - pairs * 2 * size
    if rest < min(costs.values()):
        raise _too_small(budget, source, pairs * 2 * size + min(costs.values()), "gt")
    leading = {name: source.spectra[name][: len(LEVELS)] for name in members}
    gates = dict.fromkeys(source.deltas, 0) | allocate.within_budget(leading, costs, rest)
    rest -= allocate.cost_of({name: gates[name] for name in members}, costs)
    if options.uniform:
        limits = {name: len(values) - gates[name] for name, values in source.spectra.items()}
        ranks = allocate.uniform(limits, source.costs, rest)
    else:
        ranks = allocate.within_budget(source.spectra, source.costs, rest, first=gates)
    notes = []
    if size != (options.shared_size or GATE_SIZE):
        notes.append(f"the shared size was cut from {GATE_SIZE} to {size} to fit the budget")
    if any(gates[name] < len(LEVELS) for name in members):
        notes.append("not every module has both gated paths: the budget ends before")
    return replace(_gated(source, transform, levels, gates, ranks), notes=tuple(notes))


def _gated(source: Source, transform: Gate, levels: Mapping[str, int], gates: Ranks, ranks: Ranks) -> Fit:
    """Each module's leading components: `ranks` of them local, the next `gates` of them gated.

    The shared pair enters a gated path only as the number c (see `transforms.gate`); unit vectors make it one.
    """
    group_of = {level: {n: g for g, names in source.groups[level].items() for n in names} for level in LEVELS}
    used = [level for level in LEVELS if levels[level]]
    modules = {}
    pairs: dict[str, dict[str, Factors]] = {level: {} for level in used}
    for name, delta in source.deltas.items():
        local, count = ranks[name], gates[name]
        whole = source.svds[name].truncate([delta.factors()], local + count)
        paths = {}
        for position, level in enumerate(used[:count], start=local):
            group = group_of[level][name]
            unit = torch.eye(transform.size, levels[level]).to(whole.b)
            pairs[level].setdefault(group, Factors(unit, unit.T.contiguous()))
            present = position < whole.rank
            out, width = delta.shape
            paths[level] = Path(
                group,
                {
                    "input_down": whole.a[position : position + 1] if present else whole.a.new_zeros((1, width)),
                    "input_up": unit[:, :1].contiguous(),
                    "output_down": unit[:, :1].T.contiguous(),
                    "output_up": whole.b[:, position : position + 1] if present else whole.b.new_zeros((out, 1)),
                },
            )
        kept = Factors(whole.b[:, :local], whole.a[:local])
        modules[name] = Module(delta.shape, kept, paths, _kind(source, name))
    lost = allocate.lost_energy(source.spectra, ranks, first=gates)
    return Fit(BsloraForm(transform, modules, pairs), lost)


# --- slices and Kronecker blocks ------------------------------------------------------------------------------


def _problem(source: Source, options: Options) -> Problem:
    groups = source.groups
    shapes = [source.shapes[name] for name in groups["inter"][ENTIRE]]
    transform: Kronecker | Slice
    if options.transform == "ke":
        transform = Kronecker.dividing(shapes, options.shared_size)
    else:
        transform = Slice.covering(shapes, options.window)
    return Problem(source.deltas, source.grams, source.svds, transform, source.costs, groups, options.kernel)


def shared_parameters(problem: Problem, levels: Mapping[str, int]) -> int:
    """Numbers that the shared pairs and the modules' kernels store at these ranks."""
    total = 0
    for level, rank in levels.items():
        if rank:
            pair_rank, kernel_rank = problem.split(rank)
            for members in problem.groups[level].values():
                total += pair_parameters(problem.transform, pair_rank)
                total += sum(
                    own_parameters(problem.transform, problem.deltas[name].shape, kernel_rank) for name in members
                )
    return total


def _search(source: Source, options: Options, budget: int, progress: Progress) -> Fit:
    """Shared ranks and local ranks of lowest error at `budget` (module docstring)."""
    problem = _problem(source, options)

    def allocation_for(levels: Mapping[str, int]) -> Allocation | None:
        rest = budget - shared_parameters(problem, levels)
        return _within(source, rest, options.uniform) if rest >= 0 else None

    levels = dict.fromkeys(LEVELS, options.min_shared)
    allocation = allocation_for(levels)
    if allocation is None:
        raise _too_small(budget, source, shared_parameters(problem, levels), options.transform)
    state, history = _fit_at(problem, levels, allocation, options.seed, progress)
    improved = True
    while improved:
        improved = False
        for level in LEVELS:
            larger = {**levels, level: max(1, 2 * levels[level])}
            allocation = allocation_for(larger)
            if allocation is None or larger[level] > _rank_limit(problem):
                continue
            if _hopeless(problem, state, level, levels, larger):
                continue
            progress(f"trying ranks {larger['intra']} within layers, {larger['inter']} across")
            trial = _run(problem, state, larger, allocation, options.seed, TRIAL_SWEEPS)[0]
            if not levels[level] and trial.lost >= state.lost:
                trial = _run(problem, State(math.inf), larger, allocation, options.seed, TRIAL_SWEEPS)[0]
            if trial.lost < state.lost * (1 - TOLERANCE):
                state, more = _run(problem, trial, larger, allocation, options.seed, SWEEPS)
                levels, improved = larger, True
                history = more
    if any(levels[level] > options.min_shared for level in LEVELS):
        # Growing rank by rank leaves local ranks that suited smaller shared parts: start afresh at the ranks found.
        fresh_allocation = allocation_for(levels)
        assert fresh_allocation is not None  # the search has just used it
        fresh, fresh_history = _fit_at(problem, levels, fresh_allocation, options.seed, progress)
        if fresh.lost < state.lost:
            state, history = fresh, fresh_history
    return _finish(problem, source, state, history)


def _hopeless(problem: Problem, state: State, level: str, levels: Mapping[str, int], larger: Mapping[str, int]) -> bool:
    """Whether a larger rank can't earn, by far, what its numbers would earn as local components."""
    headroom = sum(value for (at, _), value in state.headroom.items() if at == level) if levels[level] else math.inf
    added = shared_parameters(problem, larger) - shared_parameters(problem, levels)
    return CAUTION * headroom < state.price * added


def _rank_limit(problem: Problem) -> int:
    return min(LARGEST_SHARED_RANK, *problem.transform.pair_sizes)


def _fit_at(
    problem: Problem, levels: Mapping[str, int], allocation: Allocation, seed: int, progress: Progress
) -> tuple[State, list[float]]:
    """Sweeps from the local parts, or from the shared parts where those carry more, until the objective settles."""
    for level, rank in levels.items():
        if rank > min(problem.transform.pair_sizes):
            raise RecipeError(
                f"ranks: {level} rank {rank} is larger than the shared size {min(problem.transform.pair_sizes)}"
            )
    state = fit_locals(problem, State(math.inf), allocation)
    if not any(levels.values()):
        return state, [state.lost]
    progress("starting the shared parts")
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
    progress: Progress = _quiet,
) -> tuple[State, list[float]]:
    """Up to `sweeps` sweeps; stops when the objective settles."""
    generator = torch.Generator().manual_seed(seed)
    energy = sum(grams.energy for grams in problem.grams.values())
    history = []
    for number in range(1, sweeps + 1):
        before = state.lost
        state = sweep(problem, state, levels, allocation, generator)
        history.append(state.lost)
        progress(f"sweep {number}, error {math.sqrt(state.lost / energy) if energy else 0:.4f}")
        if _settled(before, state.lost) or state.lost <= FLOOR * energy:
            break
    return state, history


def _settled(before: float, after: float) -> bool:
    """Whether a sweep changed too little for another one."""
    return before - after <= TOLERANCE * after


def _finish(problem: Problem, source: Source, state: State, history: list[float]) -> Fit:
    modules = {}
    for name, delta in source.deltas.items():
        paths = {level: Path(*state.uses[level, name]) for level in LEVELS if (level, name) in state.uses}
        modules[name] = Module(delta.shape, local_factors(problem, state, name), paths, _kind(source, name))
    shared: dict[str, dict[str, Factors]] = {}
    for (level, group), pair in state.pairs.items():
        shared.setdefault(level, {})[group] = pair
    return Fit(BsloraForm(problem.transform if shared else None, modules, shared), state.lost, tuple(history))


def _too_small(budget: int, source: Source, needed: int, transform: str) -> RecipeError:
    return RecipeError(
        f"budget: {budget} numbers ({budget / source.parameters:.4g} of the LoRA) can't hold the shared parts of "
        f"--transform {transform}, which need {needed} ({needed / source.parameters:.4g}); "
        "raise --budget or use --transform none or auto"
    )
