"""How much rank an adapter has, module by module.

stable rank      ‖ΔW‖_F² / ‖ΔW‖₂²
effective rank   exp(−Σ p ln p), p = σ² / Σ σ²            (Roy and Vetterli, 2007, on energies)
rank for a share the fewest components that keep 90, 95 or 99 % of the module's energy
"""

from typing import Any

import torch
from torch import Tensor

from bslora_convert.fit import allocate
from bslora_convert.fit.source import Source

SHARES = (0.9, 0.95, 0.99)


def of_module(energies: Tensor, rank: int) -> dict[str, Any]:
    """Every measure of one module from its σ² (q,), falling; nothing but the rank where ΔW is zero."""
    total = float(energies.sum())
    if total == 0:
        return {
            "rank": rank,
            "energy": 0.0,
            "stable_rank": 0.0,
            "effective_rank": 0.0,
            "rank_for": dict.fromkeys(map(str, SHARES), 0),
        }
    share = energies / total
    positive = share[share > 0]
    reached = share.cumsum(0)
    return {
        "rank": rank,
        "energy": total,
        "stable_rank": total / float(energies[0]),
        "effective_rank": float(torch.exp(-(positive * positive.log()).sum())),
        "rank_for": {str(wanted): _needed(reached, wanted) for wanted in SHARES},
    }  # fmt: skip


def _needed(reached: Tensor, share: float) -> int:
    """Components until `reached` (q,), rising to 1, is at least a share."""
    return min(int((reached < share - 1e-12).sum()) + 1, len(reached))


def of_adapter(source: Source) -> dict[str, dict[str, Any]]:
    """For each share: the largest rank that a module needs for it, and the share of the parameters that adaptive ranks take.

    The second keeps the share of the whole adapter's energy, rank given where it buys most.
    """
    found = {}
    for share in SHARES:
        ranks = allocate.within_energy(source.spectra, source.costs, (1 - share) * source.energy)
        each = [of_module(values, len(values))["rank_for"][str(share)] for values in source.spectra.values()]
        found[str(share)] = {
            "largest_module_rank": max(each),
            "median_module_rank": sorted(each)[len(each) // 2],
            "parameter_ratio": allocate.cost_of(ranks, source.costs) / source.parameters,
        }
    return found
