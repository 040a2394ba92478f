"""LoRAs whose numbers are rounded to a grid, one after the other: what quantisers of weights make of an adapter.

rtn_int8, rtn_int4, nf4             the adapter's own B and A, all of them, at the size that this has
svd_rtn_int8, svd_rtn_int4, svd_nf4 the truncated SVD, √σ on both sides, of the largest rank for all modules whose codes fit
…_adaptive                          the same with ranks by energy per number over all modules, as `svd_adaptive` has them

    B A -> U_k √Σ_k · √Σ_k V_kᵀ -> each side rounded (`blocks`, `nf4`)

Integers have the blocks of 128 that GPTQ, AWQ and LoRAQuant write: blocks of 64 lose a tenth less of a real adapter and take
1/8 bit a number more, which is worth a sixth. `svd_int8` and `svd_int4` of the comparison are our own code (trellis, components
and refits chosen by loss) held to one width.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from bslora_convert.baselines.baseline import Fitted, Fitter, largest
from bslora_convert.baselines.blocks import CodedFactors, Grid, rtn
from bslora_convert.baselines.nf4 import NF4
from bslora_convert.fit import allocate
from bslora_convert.fit.allocate import Ranks
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import Factors

BLOCK = 128
GRIDS: Mapping[str, Grid] = {"rtn_int8": rtn(8, BLOCK), "rtn_int4": rtn(4, BLOCK), "nf4": NF4}


def coded(grid: Grid, factors: Factors, scaling: float = 1.0) -> CodedFactors:
    """Both sides on one grid."""
    return CodedFactors(((grid.encode(factors.b.float().T), grid.encode(factors.a.float())),), scaling)


def quantised_in(
    source: Source, code: Callable[[str], CodedFactors], settings: Mapping[str, object] | None = None
) -> Fitted:
    """The fit that codes each module so."""
    found = dict(zip(source.deltas, each(code, source.deltas), strict=True))
    deltas = {name: pair.factors() for name, pair in found.items()}
    parameters = sum(factors.parameters for factors in deltas.values())
    return Fitted(
        deltas,
        parameters,
        settings or {},
        bytes=sum(pair.bytes for pair in found.values()),
        times=lambda name, by: found[name].times(by).factors(),
    )


def whole(grid: Grid, source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """The adapter's own factors, whatever size they have."""

    def code(name: str) -> CodedFactors:
        delta = source.deltas[name]
        return coded(grid, delta.stored, delta.scaling)

    return quantised_in(source, code)


def truncated(name: str, adaptive: bool, source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """The truncated SVD of the largest ranks whose codes fit.

    :raises OutOfReach: when the codes of the least ranks are more than the budget.
    """
    grid = GRIDS[name]
    ranks_of = _by_energy(source) if adaptive else _for_all(source)
    limit = source.parameters if adaptive else max(map(len, source.spectra.values()))
    found = largest(
        lambda size: bytes_of(grid, source, ranks_of(size)), budget * storage.itemsize, limit, f"svd_{name}", "bytes"
    )
    ranks = ranks_of(found)

    def code(module: str) -> CodedFactors:
        return coded(grid, source.svds[module].truncate([source.deltas[module].factors()], ranks[module]))

    settings = {"rank": max(ranks.values()), "least rank": min(ranks.values())}
    return quantised_in(source, code, settings)


def bytes_of(grid: Grid, source: Source, ranks: Mapping[str, int]) -> int:
    """Bytes of the codes of these ranks."""
    return sum(grid.bytes(rank, side) for name, rank in ranks.items() for side in source.shapes[name])


def _for_all(source: Source) -> Callable[[int], Ranks]:
    return lambda rank: {name: min(rank, len(energies)) for name, energies in source.spectra.items()}


def _by_energy(source: Source) -> Callable[[int], Ranks]:
    least = min(source.costs.values())
    return lambda numbers: allocate.within_budget(source.spectra, source.costs, max(numbers, least))


WHOLE: Mapping[str, Fitter] = {name: partial(whole, grid) for name, grid in GRIDS.items()}

TRUNCATED: Mapping[str, Fitter] = {
    **{f"svd_{name}": partial(truncated, name, False) for name in GRIDS},
    **{f"svd_{name}_adaptive": partial(truncated, name, True) for name in GRIDS},
}
