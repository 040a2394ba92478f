"""VeRA (arXiv 2310.11454): two vectors for each module between random matrices that a seed makes again.

    ΔW_m = diag(λ_b) B[:out_m] diag(λ_d) A[:, :in_m]        λ_b (out_m,), λ_d (r,)        Σ_m (out_m + r) numbers

A (r, max in) and B (max out, r) are drawn once for all modules, as PEFT draws them: a CPU generator seeded with
`projection_prng_key`, A before B, uniform in ±√(6 / columns). No alpha.

The fit alternates exact least squares for λ_b and λ_d of each module by itself, for ΔW = P Q with P (out, R), Q (R, in). With
G = A Aᵀ over the module's columns, C = B ∘ (P (Q Aᵀ)) (out, r) and ∘ the product entry by entry:

    λ_b    λ_b,o = (C λ_d)_o / ‖(B diag(λ_d) A)_o‖²                            a number for each row
    λ_d    ((Bᵀ diag(λ_b²) B) ∘ G) λ_d = Cᵀ λ_b                                one r×r system

Random rows are nearly orthogonal, so the problem is close to the best rank-1 fit λ_b λ_dᵀ of C, whose leading singular
vectors are the start; two or three sweeps are left to do.

The rank is the largest that fits, up to 1024, the largest that the paper uses: a greater one has r×r systems that take minutes
and, with r numbers for out · in entries, gains next to nothing.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.baselines.baseline import Fitted, Made, largest, rounded
from bslora_convert.baselines.peft_files import save_peft
from bslora_convert.baselines.proximal import toward_optimum
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.lora.keys import PREFIX
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import Grams

LARGEST_RANK = 1024
SWEEPS = 100
TOLERANCE = 1e-3  # share of the objective that a sweep must take off it to be followed by another
FLOOR = 1e-13  # of the energy: below it the objective is rounding
POWER_STEPS = 12


@dataclass(frozen=True, slots=True)
class ModuleScales:
    """What one module stores: λ_b (out,), λ_d (r,)."""

    b: Tensor
    d: Tensor

    def balanced(self) -> "ModuleScales":
        """The same product, both of one mean square."""
        mean_b, mean_d = self.b.square().mean().sqrt(), self.d.square().mean().sqrt()
        if float(mean_b) == 0.0 or float(mean_d) == 0.0:
            return self
        ratio = (mean_b / mean_d).sqrt()
        return ModuleScales(self.b / ratio, self.d * ratio)

    def stored(self, storage: torch.dtype) -> "ModuleScales":
        """As they come back from a file."""
        return ModuleScales(rounded(self.b, storage), rounded(self.d, storage))

    def delta(self, frozen: Factors) -> Factors:
        """The module's update, its frozen matrices given: (out, r), (r, in)."""
        return Factors(self.b[:, None] * frozen.b * self.d, frozen.a)


@dataclass(frozen=True, slots=True)
class FrozenSide:
    """What modules of one input width have in common: A (r, in), G = A Aᵀ, and F with F Fᵀ = G as narrow as it can be."""

    a: Tensor
    gram: Tensor
    root: Tensor

    @classmethod
    def of(cls, a: Tensor) -> "FrozenSide":
        """Of the columns of A that the modules see, in float64."""
        a = a.double()
        gram = a @ a.T
        if a.shape[1] <= a.shape[0]:
            return cls(a, gram, a)
        root, failed = torch.linalg.cholesky_ex(gram)
        return cls(a, gram, a if int(failed) else root)


def fit_vera(source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """λ_b and λ_d of every module, between the random matrices of this seed.

    :raises OutOfReach: when rank 1 is more than the budget.
    """
    shapes = source.shapes
    rank = largest(lambda r: vera_parameters(shapes, r), budget, LARGEST_RANK, "VeRA")
    frozen = projections(shapes, rank, seed)
    device = next(iter(source.deltas.values())).stored.b.device
    b, a = frozen.b.to(device), frozen.a.to(device)
    sides = {width: FrozenSide.of(a[:, :width]) for width in {width for _, width in shapes.values()}}

    def fitted(name: str) -> ModuleScales:
        out, width = shapes[name]
        scales, _ = fit_scales(source.deltas[name].factors(), b[:out], sides[width])
        return scales.balanced().stored(storage)

    found = dict(zip(shapes, each(fitted, shapes), strict=True))

    def make(name: str) -> Factors:
        out, width = shapes[name]
        return found[name].delta(Factors(b[:out], a[:, :width]))

    def save(directory: Path, config: Mapping[str, Any]) -> None:
        """A PEFT VeRA adapter; the random matrices are left to its seed, so the file holds what is counted."""
        own = {
            "peft_type": "VERA",
            "r": rank,
            "target_modules": list(shapes),
            "projection_prng_key": seed,
            "save_projection": False,
            "vera_dropout": 0.0,
        }
        tensors = {f"{PREFIX}{name}.vera_lambda_b": scales.b.to(storage) for name, scales in found.items()}
        tensors |= {f"{PREFIX}{name}.vera_lambda_d": scales.d.to(storage) for name, scales in found.items()}
        save_peft(directory, config, own, tensors)

    linear = all(source.kind(name) == "linear" for name in shapes)  # PEFT's VeRA has no embeddings
    deltas = Made(list(shapes), make)
    return Fitted(deltas, vera_parameters(shapes, rank), {"rank": rank, "seed": seed}, save if linear else None)


def vera_parameters(shapes: Mapping[str, Shape], rank: int) -> int:
    """Numbers that VeRA stores."""
    return sum(out + rank for out, _ in shapes.values())


def projections(shapes: Mapping[str, Shape], rank: int, seed: int) -> Factors:
    """The random matrices of this seed: B (max out, r), A (r, max in), float32 on the CPU whatever the device."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def uniform(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))  # in PEFT's order, for the last digit's sake
        return torch.empty((rows, columns), dtype=torch.float32).uniform_(-bound, bound, generator=generator)

    a = uniform(rank, max(width for _, width in shapes.values()))
    b = uniform(max(out for out, _ in shapes.values()), rank)
    return Factors(b, a)


def fit_scales(target: Factors, b: Tensor, side: FrozenSide) -> tuple[ModuleScales, list[float]]:
    """λ_b, λ_d of one module, float64, and the objective after each sweep (module docstring).

    target: (out, R), (R, in). b: (out, r).
    """
    b = b.double()
    energy = Grams.of(target).energy
    c = b * (target.b.double() @ (target.a.double() @ side.a.T))
    d = _leading(c)
    rows = c.new_zeros(len(c))
    history: list[float] = []
    for _ in range(SWEEPS):
        weight = ((b * d) @ side.root).square().sum(1)
        rows = torch.where(weight > 0, (c @ d) / torch.where(weight > 0, weight, 1.0), rows)
        scaled = rows[:, None] * b
        normal, right = (scaled.T @ scaled) * side.gram, c.T @ rows
        d = toward_optimum(normal, right[:, None], d[:, None])[:, 0]
        history.append(max(energy - float(2 * right @ d - d @ normal @ d), 0.0))
        lost = history[-1]
        if lost <= FLOOR * energy or (len(history) > 1 and history[-2] - lost < TOLERANCE * lost):
            break
    return ModuleScales(rows, d), history


def _leading(c: Tensor) -> Tensor:
    """The leading right singular vector of (out, r), by power steps from the longest row."""
    d = c[c.square().sum(1).argmax()]
    for _ in range(POWER_STEPS):
        d = d / d.norm().clamp_min(torch.finfo(d.dtype).tiny)
        d = c.T @ (c @ d)
    unit: Tensor = d / d.norm().clamp_min(torch.finfo(d.dtype).tiny)
    return unit
