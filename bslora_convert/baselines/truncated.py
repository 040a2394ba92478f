"""Plain LoRA of lower rank: the truncated SVD of every module, the control that every sharing form has to beat.

    ΔŴ_m = the first r_m terms of the SVD of B_m A_m          Σ_m r_m (out_m + in_m) numbers

svd_uniform    one rank for all modules, the largest that fits, cut to what a module has
svd_adaptive   ranks by energy per number over all modules (`fit.allocate`); a module may end with none

Both are closed forms: Eckart and Young's theorem for each module, and for the ranks the greedy order, which is the optimum at
every budget that it spends in full.
"""

import torch

from bslora_convert.baselines.baseline import Fitted, OutOfReach, rounded
from bslora_convert.fit import allocate
from bslora_convert.fit.allocate import Ranks
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import Factors


def svd_uniform(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """The SVD of every module cut to one rank.

    :raises OutOfReach: when rank 1 of every module is more than the budget.
    """
    limits = {name: len(energies) for name, energies in source.spectra.items()}
    ranks = allocate.uniform(limits, source.costs, budget)
    return _truncated(source, ranks, budget, storage, sum(source.costs.values()))


def svd_adaptive(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """The SVD of every module cut where a number buys most energy.

    :raises OutOfReach: when not even one component of the cheapest module fits.
    """
    ranks = allocate.within_budget(source.spectra, source.costs, budget)
    return _truncated(source, ranks, budget, storage, min(source.costs.values()))


def _truncated(source: Source, ranks: Ranks, budget: int, storage: torch.dtype, least: int) -> Fitted:
    if budget < least:
        raise OutOfReach(f"truncated SVD needs {least} numbers at least, the budget is {budget}")

    def cut(name: str) -> Factors:
        short = source.svds[name].truncate([source.deltas[name].factors()], ranks[name])
        return Factors(rounded(short.b, storage), rounded(short.a, storage))

    deltas = dict(zip(ranks, each(cut, ranks), strict=True))

    settings = {"rank": max(ranks.values()), "least rank": min(ranks.values())}
    return Fitted(deltas, allocate.cost_of(ranks, source.costs), settings)
