"""Gate transformation: a truncated SVD with one or two components of each module held by gates.

A gated path is a free rank-one term (`transforms.gate`), so the best fit of local rank l with g gates is the truncated SVD of
rank l + g. A gate stores 2 s numbers more than the local rank that it equals; under a budget the gates are paid first, as far as
they go, and the local ranks get the rest.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from bslora_convert.bslora.counts import own_parameters
from bslora_convert.bslora.form import LEVELS, BsloraForm, Module, Path
from bslora_convert.bslora.transforms import Gate
from bslora_convert.bslora.transforms.gate import DEFAULT_SIZE
from bslora_convert.fit import allocate
from bslora_convert.fit.allocate import Ranks
from bslora_convert.fit.source import Fit, Source, handed_over, leading, local_most, too_small
from bslora_convert.modules.factors import Factors
from bslora_convert.recipe.structure import Structure

SIZE_SHARE = 0.05  # share of a budget that may go into the shared size of gates


def gated_by_hand(
    source: Source, structure: Structure, levels: Mapping[str, int], local: int, storage: torch.dtype | None = None
) -> Fit:
    """Local rank and shared ranks (level -> rank) as given; a level of rank 0 has no gates."""
    transform = Gate(structure.shared_size or DEFAULT_SIZE)
    grouped = {name for members in source.groups["intra"].values() for name in members}
    gates = {name: sum(rank > 0 for rank in levels.values()) if name in grouped else 0 for name in source.deltas}
    most = local_most(source, structure.most_rank, max(gates.values(), default=0))
    if structure.is_uniform:
        ranks = {name: min(local, len(values)) for name, values in leading(source.spectra, most).items()}
    else:
        numbers = local * sum(source.costs.values())
        ranks = allocate.within_budget(_allowed(source, structure), source.costs, numbers, first=gates)
    return _gated(source, transform, levels, gates, ranks, storage)


def gated_to_budget(source: Source, structure: Structure, budget: int, storage: torch.dtype | None = None) -> Fit:
    """Gates first, the rest to local ranks.

    The default shared size is halved until what depends on it takes at most a twentieth of the budget: it changes the size of
    the result and nothing else. Where gates alone exceed the budget, those that gain least are left out.
    """
    levels = dict.fromkeys(LEVELS, max(structure.min_shared or 0, 1))
    members = source.sharing
    pairs = sum(rank * len(source.groups[level]) for level, rank in levels.items())
    size = structure.shared_size or DEFAULT_SIZE

    def gate_costs(transform: Gate) -> dict[str, int]:
        return {name: own_parameters(transform, source.shapes[name]) for name in members}

    per_row = 2 * pairs + 2 * len(LEVELS) * len(members)  # numbers that one row and column of shared size takes
    while structure.shared_size is None and size > 1 and per_row * size > SIZE_SHARE * budget:
        size //= 2
    transform = Gate(size)
    costs = gate_costs(transform)
    rest = budget - pairs * 2 * size
    if rest < min(costs.values()):
        raise too_small(budget, source, pairs * 2 * size + min(costs.values()), "gt")
    allowed = _allowed(source, structure)
    first = {name: allowed[name][: len(LEVELS)] for name in members}
    gates = dict.fromkeys(source.deltas, 0) | allocate.within_budget(first, costs, rest)
    rest -= allocate.cost_of({name: gates[name] for name in members}, costs)
    if structure.is_uniform:
        limits = {name: len(values) - gates[name] for name, values in allowed.items()}
        ranks = allocate.uniform(limits, source.costs, rest)
    else:
        ranks = allocate.within_budget(allowed, source.costs, rest, first=gates)
    notes = []
    if size != (structure.shared_size or DEFAULT_SIZE):
        notes.append(f"the shared size was cut from {DEFAULT_SIZE} to {size} to fit the budget")
    if any(gates[name] < len(LEVELS) for name in members):
        end = "the budget" if structure.most_rank is None or structure.most_rank >= len(LEVELS) else "the greatest rank"
        notes.append(f"not every module has both gated paths: {end} ends before")
    return replace(_gated(source, transform, levels, gates, ranks, storage), notes=tuple(notes))


def _allowed(source: Source, structure: Structure) -> Mapping[str, Tensor]:
    """Of each module the components that it may have, gated ones counted."""
    most = structure.most_rank
    return leading(source.spectra, None if most is None else dict.fromkeys(source.spectra, most))


def _gated(
    source: Source, transform: Gate, levels: Mapping[str, int], gates: Ranks, ranks: Ranks, storage: torch.dtype | None
) -> Fit:
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
        kept = handed_over(Factors(whole.b[:, :local], whole.a[:local]), storage)
        modules[name] = Module(delta.shape, kept, paths, source.kind(name))
    lost = allocate.lost_energy(source.spectra, ranks, first=gates)
    return Fit(BsloraForm(transform, modules, pairs), lost)
