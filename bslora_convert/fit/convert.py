"""The fit of a whole adapter: the one place that knows which steps a transform takes.

measure    Gram matrices and spectra of every ΔW_m in its metric, once    `source`
none       truncated SVD, ranks uniform or adaptive            here
gt         the same, some components held by gates             `gated`
ss, ke     alternating sweeps over inter, intra, local parts   `search`
auto       the lowest error of these at one size               here
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor

from bslora_convert.bslora.form import LEVELS, BsloraForm, Module
from bslora_convert.errors import RecipeError
from bslora_convert.fit import allocate
from bslora_convert.fit.allocate import Ranks
from bslora_convert.fit.alternate import Allocation
from bslora_convert.fit.gated import gated_by_hand, gated_to_budget
from bslora_convert.fit.in_metric import balanced, locals_in
from bslora_convert.fit.parallel import each
from bslora_convert.fit.search import finish, fit_at, problem_of, search
from bslora_convert.fit.source import (
    Fit,
    Source,
    handed_over,
    leading,
    local_most,
    measure,
    within,
)
from bslora_convert.modules.factors import Factors
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.structure import Structure

SHARING = ("ke", "ss")  # that `auto` tries: gates equal `none` at more numbers

__all__ = ["Fit", "Source", "fit_by_hand", "fit_to_budget", "measure"]


def fit_to_budget(
    source: Source, structure: Structure, budget: int, seed: int = 0, storage: torch.dtype | None = None,
    progress: Progress = silent,
) -> Fit:  # fmt: skip
    """The form of lowest error that stores at most `budget` numbers.

    structure: `auto` gives the lowest error over `none`, `ke` and `ss`. seed: of random starts. storage: dtype in which local
    parts are handed over, one by one, so that they never stand in memory together in the compute dtype; None keeps that.

    :raises RecipeError: when the least form of this transform stores more.
    """
    if structure.transform == "auto":
        plain = fit_to_budget(source, structure.each()[0], budget, seed, storage)
        if not source.sharing:
            return plain
        note = "auto compared {} at this size; gt equals none at more numbers and was left out"
        with suppress(RecipeError):  # the size holds no shared parts
            found = _each_sharing(lambda one: fit_to_budget(source, one, budget, seed, storage, progress), structure)
            return _best({"none": plain, **found}, note)
        return plain
    if not shares(source, structure):
        return _plain(source, within(source, budget, structure), storage)
    if structure.transform == "gt":
        return gated_to_budget(source, structure, budget, storage)
    return _in_metrics(source, structure, search(source.plain, structure, budget, seed, storage, progress))


def fit_by_hand(
    source: Source, structure: Structure, ranks: tuple[int, int, int], seed: int = 0, storage: torch.dtype | None = None,
    progress: Progress = silent,
) -> Fit:  # fmt: skip
    """The form of the ranks (local, intra, inter); adaptive local ranks spread the same number of local numbers.

    Arguments as of `fit_to_budget`.

    :raises RecipeError: when none of the transforms can have these ranks.
    """
    if structure.transform == "auto":
        if not (any(ranks[1:]) and source.sharing):
            return fit_by_hand(source, structure.each()[0], ranks, seed, storage, progress)
        return _best(
            _each_sharing(lambda one: fit_by_hand(source, one, ranks, seed, storage, progress), structure),
            "auto compared {} at these ranks",
        )
    local, *level_ranks = ranks
    levels = dict(zip(LEVELS, level_ranks, strict=True))
    if structure.transform == "gt" and any(level_ranks) and source.sharing:
        return gated_by_hand(source, structure, levels, local, storage)
    most = local_most(source, structure.most_rank, sum(level_ranks))
    if structure.is_uniform:

        def allocation(spectra: Mapping[str, Tensor]) -> Ranks:
            return {name: min(local, len(values)) for name, values in leading(spectra, most).items()}
    else:
        numbers = local * sum(source.costs.values())

        def allocation(spectra: Mapping[str, Tensor]) -> Ranks:
            return allocate.within_budget(leading(spectra, most), source.costs, numbers)

    if structure.transform == "none" or not any(level_ranks) or not source.sharing:
        return _plain(source, allocation, storage)
    problem = problem_of(source.plain, structure)
    found = finish(problem, source, storage, *fit_at(problem, levels, allocation, seed, progress))
    return _in_metrics(source, structure, found)


def outline(source: Source, structure: Structure, budget: int) -> Fit:
    """What `fit_to_budget` without shared parts loses, its local parts left empty: where they are coded they are made anew."""
    modules = {
        name: Module(
            delta.shape, Factors(delta.stored.b[:, :0].float(), delta.stored.a[:0].float()), {}, source.kind(name)
        )
        for name, delta in source.deltas.items()
    }
    lost = allocate.lost_energy(source.spectra, within(source, budget, structure)(source.spectra))
    return Fit(BsloraForm(None, modules), lost)


def shares(source: Source, structure: Structure) -> bool:
    """Whether a fit to a size has shared parts. A gate costs more than the local rank that it equals: one that may go goes."""
    drops_gates = structure.transform == "gt" and structure.min_shared == 0
    return structure.transform != "none" and bool(source.sharing) and not drops_gates


def _each_sharing(fit: Callable[[Structure], Fit], structure: Structure) -> dict[str, Fit]:
    """The fits of the transforms that can have what is asked for.

    :raises RecipeError: when none can.
    """
    found: dict[str, Fit] = {}
    refused: RecipeError | None = None
    for name in SHARING:
        try:
            found[name] = fit(structure.of(name))
        except RecipeError as error:
            refused = error
    if not found and refused is not None:
        raise refused
    return found


def _best(found: Mapping[str, Fit], note: str) -> Fit:
    """The fit of lowest error, the first one where they tie. note: with the place for the names of those compared."""
    best = min(found.values(), key=lambda fit: fit.lost)
    return replace(best, notes=(*best.notes, note.format(", ".join(found)))) if len(found) > 1 else best


def _in_metrics(source: Source, structure: Structure, fit: Fit) -> Fit:
    """A fit with shared parts, which are sought plainly, its local parts then in the metrics."""
    if not source.metrics:
        return fit
    form, lost = locals_in(source.metrics, source.deltas, fit.form, structure.is_uniform, structure.most_rank)
    return replace(fit, form=form, lost=lost)


def _plain(source: Source, allocation: Allocation, storage: torch.dtype | None) -> Fit:
    ranks = allocation(source.spectra)

    def module(name: str) -> Module:
        delta = source.deltas[name]
        local = source.svds[name].truncate([delta.factors()], ranks[name])
        local = balanced(local) if source.metrics else local
        return Module(delta.shape, handed_over(local, storage), {}, source.kind(name))

    modules = dict(zip(source.deltas, each(module, source.deltas), strict=True))
    return Fit(BsloraForm(None, modules), allocate.lost_energy(source.spectra, ranks))
