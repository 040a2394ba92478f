"""What a compact form keeps of the LoRA it came from, in weight space, and what plain SVD of the same size would keep.

    relative_error = ‖ΔW − ΔŴ‖_F / ‖ΔW‖_F over all modules together        energy_kept = 1 − relative_error²
    cosine         = ⟨ΔW, ΔŴ⟩ / (‖ΔW‖ ‖ΔŴ‖)
    components     = ⟨ΔW, part⟩ / ‖ΔW‖² of the local, intra and inter parts
    gain           = ⟨ΔW, ΔŴ⟩ / ‖ΔW‖², their sum: 1 = as strong as the original (`fit.gain`)

At a least-squares optimum ⟨ΔW, ΔŴ⟩ = ‖ΔŴ‖², so the components add up to the energy kept, and gain and energy kept are one.
All of it comes from Gram matrices of factors; no ΔW is formed.
"""

import math
from collections import Counter
from dataclasses import dataclass
from functools import partial

from bslora_convert.bslora.codes.coded import vectors_shape
from bslora_convert.bslora.codes.file import WIDTHS_NAME
from bslora_convert.bslora.form import PARTS, BsloraForm
from bslora_convert.bslora.layout import MIX
from bslora_convert.bslora.storage import CompactAdapter
from bslora_convert.coding import rate
from bslora_convert.fit import allocate
from bslora_convert.fit.allocate import Ranks
from bslora_convert.fit.gain import Strength
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import add
from bslora_convert.modules.lowrank import gram_beside
from bslora_convert.modules.names import kind_of
from bslora_convert.results.adapter import BaselineRecord, CodingRecord, ModuleRecord, WeightRecord

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class ModuleFidelity:
    """One module: energy = ‖ΔW‖², lost = ‖ΔW − ΔŴ‖², least = what is lost of it at the scale of least error."""

    name: str
    energy: float
    lost: float
    least: float
    local_rank: int

    @property
    def relative_error(self) -> float:
        """‖ΔW − ΔŴ‖ / ‖ΔW‖, 0 for a module whose delta is zero and stays zero."""
        return _ratio(self.lost, self.energy)


@dataclass(frozen=True, slots=True)
class WeightFidelity:
    """The whole adapter in weight space."""

    modules: tuple[ModuleFidelity, ...]
    components: dict[str, float]
    cosine: float

    @property
    def energy(self) -> float:
        """‖ΔW‖² over all modules."""
        return sum(module.energy for module in self.modules)

    @property
    def relative_error(self) -> float:
        """‖ΔW − ΔŴ‖ / ‖ΔW‖ over all modules."""
        return _ratio(sum(module.lost for module in self.modules), self.energy)

    @property
    def least_error(self) -> float:
        """The relative error that it would have with every module scaled for least error: what codes are judged by."""
        return _ratio(sum(module.least for module in self.modules), self.energy)

    def to_record(self) -> WeightRecord:
        """`weight` of fidelity.json."""
        error = self.relative_error
        return WeightRecord(
            relative_error=error,
            energy_kept=1 - error**2,
            cosine=self.cosine,
            gain=sum(self.components.values()) if self.energy else 1.0,
            components=self.components,
            modules=[
                ModuleRecord(name=m.name, relative_error=m.relative_error, energy=m.energy, local_rank=m.local_rank)
                for m in self.modules
            ],
        )


def compare(source: Source, form: BsloraForm) -> WeightFidelity:
    """Measures a form against its source."""
    components = dict.fromkeys(PARTS, 0.0)
    modules = []
    total_cross = total_form = 0.0
    for name, (along, own) in zip(source.deltas, each(partial(_products, source, form), source.deltas), strict=True):
        for part, value in along.items():
            components[part] += value
        cross, energy = sum(along.values()), source.grams[name].energy
        lost = max(energy - 2 * cross + own, 0.0)
        least = max(energy - (cross**2 / own if own else 0.0), 0.0)
        modules.append(ModuleFidelity(name, energy, lost, least, form.modules[name].local.rank))
        total_cross += cross
        total_form += own
    energy = source.energy
    return WeightFidelity(
        tuple(modules),
        {part: value / energy if energy else 0.0 for part, value in components.items()},
        total_cross / math.sqrt(energy * total_form) if energy and total_form else float(energy == total_form),
    )


def _products(source: Source, form: BsloraForm, name: str) -> tuple[dict[str, float], float]:
    """⟨ΔW, part⟩ for each part of a module, and ‖ΔŴ‖²."""
    delta, parts = source.deltas[name], form.parts(name)
    whole = add(*parts.values()).to(device=delta.stored.b.device)
    cross_b, own_b = gram_beside(delta.stored.b, whole.b)
    cross_a, own_a = gram_beside(delta.stored.a.T, whole.a.T)
    columns = (cross_b * cross_a).sum(0).split([part.rank for part in parts.values()])
    along = {part: delta.scaling * float(column.sum()) for part, column in zip(parts, columns, strict=True)}
    return along, float((own_b * own_a).sum())


def coding(source: Source, compact: CompactAdapter, least_error: float) -> CodingRecord:
    """What codes achieve beside the rate–distortion bound (`coding.rate`) for the same spectra.

    bits: of all codes. bits_per_number, numbers: of what is stored. widths: vectors by width. widths_by_part: the same for the
    local parts of each kind of module, 0 where the source's vectors are left out, and for each level's shared parts. bound: the
    least relative error that so many bits can have. least_error: that of these codes at the scales of least error.
    gap: bits a number that the bound needs less for it. There is no bound for codes against A's random initialisation.
    """
    bits = 8 * sum(tensor.nbytes for tensor in compact.codes.values())
    widths, counts = compact.codes[WIDTHS_NAME].unique(return_counts=True)
    numbers, bounded = compact.parameters, compact.layout.origin is None
    least = rate.needed(source.spectra, source.costs, least_error**2 * source.energy)
    return CodingRecord(
        bits=bits,
        numbers=numbers,
        bits_per_number=bits / numbers if numbers else 0.0,
        widths=dict(zip(map(str, widths.tolist()), counts.tolist(), strict=True)),
        widths_by_part=_widths_by_part(source, compact),
        bound=_ratio(rate.bound(source.spectra, source.costs, bits), source.energy) if bounded else None,
        least_error=least_error,
        gap=((bits - least) / numbers if numbers else 0.0) if bounded else None,
    )


def _widths_by_part(source: Source, compact: CompactAdapter) -> dict[str, dict[str, int]]:
    """Vectors by width, as text, of each kind's local parts and of each level's shared ones."""
    widths = compact.codes[WIDTHS_NAME].tolist()
    found: dict[str, Counter[int]] = {}
    at = 0
    for key, shape in compact.layout.stored():
        module, _, tensor = key.rpartition(".bslora_")
        level = tensor.partition("_")[0]
        count, _ = vectors_shape(key, shape)
        if tensor.endswith(MIX):
            level = "initialisation"
        counter = found.setdefault(kind_of(module) if level == "local" else level, Counter())
        counter.update(widths[at : at + count])
        at += count
        if level == "local":
            counter[0] += max(len(source.spectra[module]) - count, 0)
    shared_last = sorted(found, key=PARTS.__contains__)
    return {part: {str(w): n for w, n in sorted(found[part].items()) if n} for part in shared_last}


def svd_baselines(source: Source, parameters: int, whole: int) -> dict[str, BaselineRecord]:
    """Plain truncated SVD within `parameters` numbers: one rank for all modules, and the best rank for each.

    whole: the numbers that a ratio of one stands for. unbiased_error: of the same with every module unbiased (`fit.gain`).
    """
    limits = {name: len(values) for name, values in source.spectra.items()}
    choices = {
        "svd_uniform": allocate.uniform(limits, source.costs, parameters),
        "svd_adaptive": allocate.within_budget(source.spectra, source.costs, parameters),
    }
    return {
        name: BaselineRecord(
            parameter_ratio=allocate.cost_of(ranks, source.costs) / whole,
            relative_error=_ratio(allocate.lost_energy(source.spectra, ranks), source.energy),
            unbiased_error=_ratio(_lost_unbiased(source, ranks), source.energy),
        )
        for name, ranks in choices.items()
    }


def _lost_unbiased(source: Source, ranks: Ranks) -> float:
    """Energy that truncations to these ranks lose once every module is unbiased."""
    spectra = source.spectra.items()
    return sum(Strength(float(values.sum()), float(values[: ranks[name]].sum())).lost for name, values in spectra)


def _ratio(lost: float, energy: float) -> float:
    return math.sqrt(lost / energy) if energy else float(lost > 0)
