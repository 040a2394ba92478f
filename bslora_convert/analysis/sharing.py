"""How much of an adapter one shared factor explains, against adapters of the same spectra that share nothing.

    energy     1 − ‖ΔW − shared‖² / ‖ΔW‖², the shared part fitted alone: no local parts, one level at a time
    null       the same for ΔW_m = U S Vᵀ with the module's own singular values S and random orthonormal U, V
    z          (energy − mean of the nulls) / their standard deviation

Slices and Kronecker blocks are fitted as `compress` fits them. A gated path is a free rank-one term whose shared pair gives one
number, so its energy is that of each module's leading component, the same for every null by construction, and its z is 0.
"""

from collections.abc import Mapping
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

from bslora_convert.bslora.form import LEVELS
from bslora_convert.bslora.transforms import Kronecker
from bslora_convert.fit.convert import Source, fit_by_hand, measure
from bslora_convert.lora import LoraModule
from bslora_convert.process.progress import Progress
from bslora_convert.recipe.structure import Structure

PAPER_RANKS = {"intra": 4, "inter": 16}  # of the paper's triple for KE
Z_LEAST = 1e-6  # a standard deviation below this share of the mean is rounding


def random_like(source: Source, generator: torch.Generator) -> Source:
    """An adapter with the source's shapes and singular values and random singular vectors (Haar)."""

    def basis(size: int, rank: int) -> Tensor:
        q: Tensor = torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
        return q

    deltas = {}
    for name, (out, width) in source.shapes.items():
        root = source.spectra[name].cpu().pow(0.25)
        rank = min(len(root), out, width)
        b, a = basis(out, rank) * root[:rank], root[:rank, None] * basis(width, rank).T
        deltas[name] = LoraModule(b.float(), a.float(), 1.0)
    return measure(deltas, source.kinds)


def shared_energy(source: Source, draws: int, seed: int, progress: Progress) -> dict[str, dict[str, dict[str, Any]]]:
    """By transform and level: `energy`, `null_mean`, `null_std`, `z` and the `rank` of the pair that was fitted.

    draws: random adapters that make the null, two at least.
    """
    generator = torch.Generator().manual_seed(seed)
    fits = [(transform, level) for transform in ("ke", "ss") for level in LEVELS]
    total = (draws + 1) * len(fits)
    done = 0

    def energies(adapter: Source) -> dict[tuple[str, str], float]:
        nonlocal done
        found = {}
        for transform, level in fits:
            progress("measuring what is shared", done, total)
            found[transform, level] = explained(adapter, transform, level, seed)
            done += 1
        return found

    own = energies(source)
    nulls = [energies(random_like(source, generator)) for _ in range(draws)]
    result: dict[str, dict[str, dict[str, Any]]] = {"gt": {}}
    leading = sum(float(values[:1].sum()) for values in source.spectra.values()) / source.energy
    for level in LEVELS:
        result["gt"][level] = {"rank": 1, "energy": leading, "null_mean": leading, "null_std": 0.0, "z": 0.0}
    for transform, level in fits:
        values = [null[transform, level] for null in nulls]
        mean, spread = fmean(values), stdev(values)
        z = (own[transform, level] - mean) / max(spread, Z_LEAST * mean, 1e-300)
        result.setdefault(transform, {})[level] = {
            "rank": max(_ranks(source, level)), "energy": own[transform, level], "null_mean": mean, "null_std": spread, "z": z,
        }  # fmt: skip
    return result


def explained(source: Source, transform: str, level: str, seed: int = 0) -> float:
    """Share of the energy that the pairs of one level explain without anything else."""
    fit = fit_by_hand(source, Structure(transform, local_ranks="uniform"), _ranks(source, level), seed)
    return 1 - fit.lost / source.energy


def _ranks(source: Source, level: str) -> tuple[int, int, int]:
    """(0, rank, 0) or (0, 0, rank): the paper's, cut to what the pair's size can have."""
    smallest = Kronecker.dividing([source.shapes[name] for name in source.sharing]).size
    ranks = {name: min(PAPER_RANKS[name], smallest) if name == level else 0 for name in LEVELS}
    return 0, ranks["intra"], ranks["inter"]


def most_above_chance(
    energies: Mapping[str, Mapping[str, Mapping[str, Any]]], least_z: float
) -> tuple[str, str, Mapping[str, Any]] | None:
    """The transform and level that explain most above their null, of those with this z at least; None where there is none."""
    rows = [
        (transform, level, row)
        for transform, levels in energies.items()
        for level, row in levels.items()
        if row["z"] >= least_z
    ]
    return max(rows, key=lambda row: row[2]["energy"] - row[2]["null_mean"], default=None)
