"""The fit of a whole adapter: the one place that knows which steps a transform takes.

measure    Gram matrices and spectra of every ΔW_m in its metric, once    `source`
none       truncated SVD, ranks uniform or adaptive            here
gt         the same, some components held by gates             `gated`
ss, ke     alternating sweeps over inter, intra, local parts   `search`
auto       the lowest error of these at one size               here
"""

from collections.abc import Mapping
from dataclasses import replace

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
from bslora_convert.fit.source import Fit, Options, Progress, Source, leading, local_most, measure, quiet, within

SHARING = ("ke", "ss")  # of ranks by hand: gates at the same ranks are a form of more numbers

__all__ = ["Fit", "Options", "Source", "fit_by_hand", "fit_to_budget", "measure"]


def fit_to_budget(source: Source, options: Options, budget: int, progress: Progress = quiet) -> Fit:
    """The form of lowest error that stores at most `budget` numbers.

    :raises RecipeError: when the least form of this transform stores more.
    """
    if options.transform == "auto":
        return _best(source, options, budget, progress)
    if options.transform == "none" or not source.sharing or _may_drop_gates(options):
        return _plain(source, options, within(source, budget, options.uniform, local_most(source, options, 0)))
    if options.transform == "gt":
        return gated_to_budget(source, options, budget)
    return _in_metrics(source, options, search(source.plain, options, budget, progress))


def fit_by_hand(source: Source, options: Options, ranks: tuple[int, int, int], progress: Progress = quiet) -> Fit:
    """The form of the ranks (local, intra, inter); adaptive local ranks spread the same number of local numbers."""
    if options.transform == "auto":
        return _best_by_hand(source, options, ranks, progress)
    local, *level_ranks = ranks
    levels = dict(zip(LEVELS, level_ranks, strict=True))
    if options.transform == "gt" and any(level_ranks) and source.sharing:
        return gated_by_hand(source, options, levels, local)
    most = local_most(source, options, sum(level_ranks))
    if options.uniform:

        def allocation(spectra: Mapping[str, Tensor]) -> Ranks:
            return {name: min(local, len(values)) for name, values in leading(spectra, most).items()}
    else:
        numbers = local * sum(source.costs.values())

        def allocation(spectra: Mapping[str, Tensor]) -> Ranks:
            return allocate.within_budget(leading(spectra, most), source.costs, numbers)

    if options.transform == "none" or not any(level_ranks) or not source.sharing:
        return _plain(source, options, allocation)
    problem = problem_of(source.plain, options)
    found = finish(problem, source, options, *fit_at(problem, levels, allocation, options.seed, progress))
    return _in_metrics(source, options, found)


def _may_drop_gates(options: Options) -> bool:
    """A gate costs more than the local rank that it equals, so a search that may drop gates drops them."""
    return options.transform == "gt" and options.min_shared == 0


def _best(source: Source, options: Options, budget: int, progress: Progress) -> Fit:
    """The lowest error over the transforms; the plain form where they tie. Gates never win (see `_may_drop_gates`)."""
    best = _plain(source, options, within(source, budget, options.uniform, local_most(source, options, 0)))
    if not source.sharing:
        return best
    tried = ["none"]
    for name in ("ke", "ss"):
        try:
            fit = search(source.plain, _of(options, name), budget, progress)
        except RecipeError:
            continue
        tried.append(name)
        fit = _in_metrics(source, options, fit)
        if fit.lost < best.lost:
            best = fit
    note = f"auto compared {', '.join(tried)} at this size; gt equals none at more numbers and was left out"
    return replace(best, notes=(*best.notes, note))


def _best_by_hand(source: Source, options: Options, ranks: tuple[int, int, int], progress: Progress) -> Fit:
    """The lowest error over the transforms at these ranks."""
    names = SHARING if any(ranks[1:]) and source.sharing else ("none",)
    found: dict[str, Fit] = {}
    refused: RecipeError | None = None
    for name in names:
        try:
            found[name] = fit_by_hand(source, _of(options, name), ranks, progress)
        except RecipeError as error:
            refused = error
    if not found:
        assert refused is not None  # there is a transform
        raise refused
    best = min(found.values(), key=lambda fit: fit.lost)
    note = f"auto compared {', '.join(found)} at these ranks"
    return replace(best, notes=(*best.notes, note)) if len(found) > 1 else best


def _of(options: Options, transform: str) -> Options:
    """The options for one of several transforms: a size of shared factors means nothing to windows."""
    return replace(options, transform=transform, shared_size=None if transform == "ss" else options.shared_size)


def _in_metrics(source: Source, options: Options, fit: Fit) -> Fit:
    """A fit with shared parts, which are sought plainly, its local parts then in the metrics."""
    if not source.metrics:
        return fit
    form, lost = locals_in(source.metrics, source.deltas, fit.form, options.uniform, options.most_rank)
    return replace(fit, form=form, lost=lost)


def _plain(source: Source, options: Options, allocation: Allocation) -> Fit:
    ranks = allocation(source.spectra)

    def module(name: str) -> Module:
        delta = source.deltas[name]
        local = source.svds[name].truncate([delta.factors()], 0 if options.hollow else ranks[name])
        local = balanced(local) if source.metrics else local
        return Module(delta.shape, options.handed_over(local), {}, source.kind(name))

    modules = dict(zip(source.deltas, each(module, source.deltas), strict=True))
    return Fit(BsloraForm(None, modules), allocate.lost_energy(source.spectra, ranks))
