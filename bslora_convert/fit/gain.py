"""Updates as strong as the original's: each module's scaled so that the part of it along ΔW is ΔW.

    γ = ⟨ΔW, ΔŴ⟩ / ‖ΔW‖²        its gain; 1 = unbiased. Whatever loses least error shrinks: what it leaves out is missing in γ
    ΔŴ ← s ΔŴ,  s = min(1/γ, LARGEST)

At a least-squares optimum ⟨ΔW, ΔŴ⟩ = ‖ΔŴ‖², so that the lost share is 1 − γ before and 1/γ − 1 after. The error rises a little,
and the predictions, which follow the strength of an update far more than its noise, come two to four times nearer
(docs/precision.md). Products are taken in the metric that the fit was made in.

The scale goes into what the module holds for itself: its local part and the kernel or gate that ends each shared path, so that
the whole update is scaled. A path of `ss` has nothing of the module's own; there the local part takes what is missing:

    s = (‖ΔW‖² − ⟨ΔW, T⟩) / ⟨ΔW, L⟩        T the shared parts, L the local one
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bslora_convert.bslora.form import BsloraForm, Module, Path
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.metric.metric import PLAIN, Metric
from bslora_convert.modules.factors import Factors, add
from bslora_convert.modules.lowrank import Grams, inner

LARGEST = 4.0  # of a scale: what is left of a module that needs more is noise
SLIGHT = 1e-3  # a scale nearer to one than that is finer than 16-bit numbers are


@dataclass(frozen=True, slots=True)
class Strength:
    """One module's ‖ΔW‖² (energy), ⟨ΔW, ΔŴ⟩ of what can be scaled (along) and of what can't (fixed)."""

    energy: float
    along: float
    fixed: float = 0.0

    @classmethod
    def of(cls, target: Factors, approximation: Factors, metric: Metric = PLAIN) -> "Strength":
        """That of an approximation which is scaled as a whole."""
        weighed = metric.weighed(target)
        return cls(Grams.of(weighed).energy, inner(weighed, metric.weighed(approximation)))

    @property
    def scale(self) -> float:
        """s; 1 where nothing points along ΔW, or no more than rounding is missing."""
        if self.along <= 0:
            return 1.0
        scale = min(max((self.energy - self.fixed) / self.along, 1 / LARGEST), LARGEST)
        return 1.0 if abs(scale - 1) < SLIGHT else scale

    @property
    def lost(self) -> float:
        """‖ΔW − s ΔŴ‖² of a least-squares approximation, of which ‖ΔŴ‖² = ⟨ΔW, ΔŴ⟩."""
        return self.energy - 2 * self.scale * self.along + self.scale**2 * self.along


def unbiased(source: Source, form: BsloraForm) -> BsloraForm:
    """A form in floats, whose local parts without shared ones are truncated SVDs, with every module's update unbiased."""

    def scaled(name: str) -> Module:
        module = form.modules[name]
        if not module.paths:
            energies = source.svds[name].energies
            strength = Strength(float(energies.sum()), float(energies[: module.local.rank].sum()))
        else:
            strength = strength_in(source, form, name)
        return scaled_by(form, name, strength.scale)

    return replace(form, modules=dict(zip(form.modules, each(scaled, form.modules), strict=True)))


def strength_in(source: Source, form: BsloraForm, name: str) -> Strength:
    """A module's, in its metric."""
    metric = source.metric(name)
    target = metric.weighed(source.deltas[name].factors())
    parts = form.parts(name)
    held = parts if carrier_of(form) else {"local": parts.pop("local")}
    energy = float(source.svds[name].energies.sum())
    fixed = inner(target, metric.weighed(add(*parts.values()))) if held is not parts and parts else 0.0
    return Strength(energy, inner(target, metric.weighed(add(*held.values()))), fixed)


def carrier_of(form: BsloraForm) -> str | None:
    """The tensor of a module's own that its shared terms are linear in; None where it has none."""
    return form.transform.carrier if form.transform is not None else None


def scaled_by(form: BsloraForm, name: str, scale: float) -> Module:
    """A module with its update scaled, as far as it holds it for itself."""
    module, carrier = form.modules[name], carrier_of(form)
    if scale == 1:
        return module

    def times(tensor: Tensor) -> Tensor:
        return (scale * tensor.to(torch.promote_types(tensor.dtype, torch.float32))).to(tensor.dtype)

    def path(one: Path) -> Path:
        own: Mapping[str, Tensor] = one.own
        return one if carrier is None else replace(one, own={**own, carrier: times(own[carrier])})

    local = Factors(times(module.local.b), module.local.a)
    return replace(module, local=local, paths={level: path(one) for level, one in module.paths.items()})
