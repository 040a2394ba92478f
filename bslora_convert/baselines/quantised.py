"""LoRAs whose numbers are rounded to a grid, one after the other: what quantisers of weights make of an adapter.

rtn_int8, rtn_int4, nf4             the adapter's own B and A, all of them, at the size that this has
svd_rtn_int8, svd_rtn_int4, svd_nf4 the truncated SVD, √σ on both sides, of the largest rank for all modules whose codes fit
…_adaptive                          the same with ranks by energy per number over all modules, as `svd_adaptive` has them
…_initial                           the same with A's random initialisation known: A = T A₀ + Δ, Δ rounded (`initialised`)

    B A -> U_k √Σ_k · √Σ_k V_kᵀ -> each side rounded (`blocks`, `nf4`)

Integers have the blocks of 128 that GPTQ, AWQ and LoRAQuant write: blocks of 64 lose a tenth less of a real adapter and take
1/8 bit a number more, which is worth a sixth. `svd_int8` and `svd_int4` of the comparison are our own code (trellis, components
and refits chosen by loss) held to one width.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch

from bslora_convert.baselines.baseline import Fitted, Fitter
from bslora_convert.baselines.blocks import Grid, rtn
from bslora_convert.baselines.coded import CodedFactors, larger
from bslora_convert.baselines.initialised import INITIAL, NOTHING, PLAIN, Known, Rows, best_of, lost, note_of
from bslora_convert.baselines.nf4 import NF4
from bslora_convert.baselines.ranks import Planned, by_energy, for_all
from bslora_convert.fit.allocate import Ranks
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import Factors

BLOCK = 128
GRIDS: Mapping[str, Grid] = {"rtn_int8": rtn(8, BLOCK), "rtn_int4": rtn(4, BLOCK), "nf4": NF4}


def coded(grid: Grid, factors: Factors, scaling: float = 1.0, rows: Rows = PLAIN, name: str = "") -> CodedFactors:
    """Both sides of a module on one grid."""
    b, a = grid.encode(factors.b.float().T), factors.a.float()
    mix = rows.mix(name, a)
    rest = (a if mix is None else a - mix.decode())[: rows.coded(name, len(a))]
    codes = grid.encode(rest)
    return CodedFactors(((b, codes),), scaling, mix, (larger(rest, codes),))


def quantised_in(
    source: Source, code: Callable[[str], CodedFactors], settings: Mapping[str, object] | None = None, rows: Rows = PLAIN
) -> Fitted:  # fmt: skip
    """The fit that codes each module so."""
    found = dict(zip(source.deltas, each(code, source.deltas), strict=True))
    settings = {**(settings or {}), **rows.settings}

    def fitted(pairs: Mapping[str, CodedFactors]) -> Fitted:
        return Fitted(
            {name: pair.factors() for name, pair in pairs.items()},
            sum(pair.numbers for pair in pairs.values()),
            settings,
            bytes=sum(pair.bytes for pair in pairs.values()),
            times=lambda name, by: pairs[name].times(by).factors(),
            note=note_of(source, rows),
        )

    def in_full() -> Fitted:
        return fitted({name: pair.in_full() for name, pair in found.items()})

    return replace(fitted(found), in_full=in_full if rows.known.bases else None)


def whole(grid: Grid, initial: bool, source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """The adapter's own factors, whatever size they have.

    :raises OutOfReach: where A's random initialisation has to be known and is not.
    """
    ranks = {name: delta.rank for name, delta in source.deltas.items()}
    rows = Rows(Known.of(source), ranks) if initial else PLAIN

    def code(name: str) -> CodedFactors:
        delta = source.deltas[name]
        return coded(grid, delta.stored, delta.scaling, rows, name)

    return quantised_in(source, code, rows=rows)


def truncated(
    name: str, adaptive: bool, initial: bool, source: Source, budget: int, storage: torch.dtype, seed: int
) -> Fitted:
    """The truncated SVD of the largest ranks whose codes fit, with A's initialisation known where that loses less.

    :raises OutOfReach: when the codes of the least ranks are more than the budget, or A's random initialisation has to be known
    and is not.
    """
    grid, bytes_, known = GRIDS[name], budget * storage.itemsize, Known.of(source) if initial else NOTHING
    planned: dict[bool, Planned] = {}
    fits: dict[bool, Fitted] = {}

    def fit(against: bool) -> Fitted:
        plan = by_energy if adaptive else for_all
        ranks, rows = planned[against] = plan(grid, source, known if against else NOTHING, bytes_, f"svd_{name}")
        fits[against] = _cut(grid, source, ranks, rows)
        return fits[against]

    if not initial:
        return fit(False)
    return fits[best_of((True, False), fit, lambda against, fitted: lost(source, fitted, planned[against][1], known))]


def _cut(grid: Grid, source: Source, ranks: Ranks, rows: Rows) -> Fitted:
    """The truncated SVD of these ranks in codes."""

    def code(module: str) -> CodedFactors:
        cut = source.svds[module].truncate([source.deltas[module].factors()], ranks[module])
        return coded(grid, cut, rows=rows, name=module)

    settings = {"rank": max(ranks.values()), "least rank": min(ranks.values())}
    return quantised_in(source, code, settings, rows)


WHOLE: Mapping[str, Fitter] = {name: partial(whole, grid, False) for name, grid in GRIDS.items()}

TRUNCATED: Mapping[str, Fitter] = {
    **{f"svd_{name}": partial(truncated, name, False, False) for name in GRIDS},
    **{f"svd_{name}_adaptive": partial(truncated, name, True, False) for name in GRIDS},
}

WHOLE_INITIAL: Mapping[str, Fitter] = {f"{name}{INITIAL}": partial(whole, grid, True) for name, grid in GRIDS.items()}

TRUNCATED_INITIAL: Mapping[str, Fitter] = {
    **{f"svd_{name}{INITIAL}": partial(truncated, name, False, True) for name in GRIDS},
    **{f"svd_{name}_adaptive{INITIAL}": partial(truncated, name, True, True) for name in GRIDS},
}
