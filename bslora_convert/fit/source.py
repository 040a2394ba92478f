"""What a fit starts from and what it gives: the measured adapter, the fitted form."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from bslora_convert.bslora.form import BsloraForm
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.fit import allocate
from bslora_convert.fit.allocate import Ranks
from bslora_convert.fit.alternate import Allocation
from bslora_convert.fit.in_metric import svd_in
from bslora_convert.fit.parallel import each
from bslora_convert.initialisation.initial import Initial
from bslora_convert.metric.metric import PLAIN, Metric
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import Delta, Grams, ProductSvd, product_svd
from bslora_convert.modules.names import layer_of
from bslora_convert.recipe.structure import Structure

SMALLEST_NORM, LARGEST_NORM = 1e-12, 1e12
ENTIRE = "all"  # the inter group's name
LEAST_LOOKED_AT = 3  # layers that stand for all of them
Kept = TypeVar("Kept")


@dataclass(frozen=True, slots=True)
class Source:
    """The adapter as the fit sees it: deltas, their Gram matrices, their metrics and their SVDs in these, by module name.

    metrics: nothing where every module is measured plainly. unweighed: the plain SVDs, which `svds` are where there are none.
    initial: the random initialisation of its A's, where it is known. part: which share of an adapter's layers these are, where a
    fit is only looked at: of what all layers share they bear that much.
    """

    deltas: Mapping[str, Delta]
    kinds: Mapping[str, str]
    grams: Mapping[str, Grams]
    svds: Mapping[str, ProductSvd]
    unweighed: Mapping[str, ProductSvd]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    partition: Mapping[str, Sequence[str]] | None = None  # groups of the intra level; None: the layers
    initial: Initial | None = None
    part: float = 1.0

    def some_layers(self, every: int) -> "Source | None":
        """Modules of every so-many-th layer, what is outside of layers left out; None of an adapter with few layers."""
        layers = list(dict.fromkeys(layer for name in self.deltas if (layer := layer_of(name)) is not None))
        if len(layers) < LEAST_LOOKED_AT * every:
            return None
        chosen = set(layers[every // 2 :: every])
        names = [name for name in self.deltas if layer_of(name) in chosen]

        def own(values: Mapping[str, Kept]) -> dict[str, Kept]:
            return {name: values[name] for name in names if name in values}

        return replace(
            self, deltas=own(self.deltas), grams=own(self.grams), svds=own(self.svds), unweighed=own(self.unweighed),
            metrics=own(self.metrics), part=len(chosen) / len(layers),
        )  # fmt: skip

    @property
    def energy(self) -> float:
        """Σ ‖ΔW_m‖²."""
        return sum(grams.energy for grams in self.grams.values())

    @property
    def weight(self) -> float:
        """Σ ‖ΔW_m‖² in the metrics; the energy where they are plain."""
        return sum(float(svd.energies.sum()) for svd in self.svds.values()) if self.metrics else self.energy

    @property
    def plain(self) -> "Source":
        """The same, measured plainly."""
        return replace(self, svds=self.unweighed, metrics={}) if self.metrics else self

    def measured_in(self, metrics: Mapping[str, Metric]) -> "Source":
        """The same in other metrics, its Gram matrices kept; plainly where there are none."""
        if not metrics:
            return self.plain
        svds = dict(
            zip(self.deltas, each(lambda n: svd_in(metrics[n], self.deltas[n].factors()), self.deltas), strict=True)
        )
        return replace(self, svds=svds, metrics=metrics)

    def metric(self, name: str) -> Metric:
        """What a module is measured by."""
        return self.metrics.get(name, PLAIN)

    @property
    def spectra(self) -> dict[str, Tensor]:
        """σ² of every module, in its metric."""
        return {name: svd.energies for name, svd in self.svds.items()}

    @property
    def shapes(self) -> dict[str, Shape]:
        """(out, in) of every module."""
        return {name: delta.shape for name, delta in self.deltas.items()}

    @property
    def costs(self) -> dict[str, int]:
        """Numbers that one local rank of a module stores."""
        return {name: sum(shape) for name, shape in self.shapes.items()}

    @property
    def parameters(self) -> int:
        """Numbers that the LoRA stores."""
        return sum(delta.rank * sum(delta.shape) for delta in self.deltas.values())

    def kind(self, name: str) -> str:
        """`linear` or `embedding`."""
        return self.kinds.get(name, "linear")

    @property
    def sharing(self) -> list[str]:
        """Modules that may share: linear ones of a numbered layer."""
        return self.groups["inter"].get(ENTIRE, [])

    @property
    def groups(self) -> dict[str, dict[str, list[str]]]:
        """Who shares: modules of a numbered layer with their layer or partition (intra) and all of them (inter)."""
        layers: dict[str, list[str]] = {}
        for name in self.deltas:
            layer = layer_of(name)
            if layer is not None and self.kind(name) == "linear":
                layers.setdefault(layer, []).append(name)
        everyone = [name for members in layers.values() for name in members]
        if self.partition is not None:
            may = set(everyone)
            chosen = {group: [name for name in members if name in may] for group, members in self.partition.items()}
            layers = {group: members for group, members in chosen.items() if members}
        return {"intra": layers, "inter": {ENTIRE: everyone} if everyone else {}}


@dataclass(frozen=True, slots=True)
class Fit:
    """A form and what it loses: Σ ‖ΔW − ΔŴ‖² in the metrics, in the fit's own precision; the objective after each sweep."""

    form: BsloraForm
    lost: float
    history: tuple[float, ...] = ()
    notes: tuple[str, ...] = field(default=())


def measure(
    deltas: Mapping[str, Delta],
    kinds: Mapping[str, str] | None = None,
    metrics: Mapping[str, Metric] | None = None,
) -> Source:
    """Gram matrices and SVDs of every module, SVDs in its metric too."""
    grams = dict(zip(deltas, each(Grams.of_delta, deltas.values()), strict=True))
    svds = dict(zip(deltas, each(product_svd, grams.values()), strict=True))
    return Source(deltas, kinds or {}, grams, svds, svds).measured_in(metrics or {})


def check_magnitude(source: Source, where: object) -> None:
    """Refuses deltas that float32 arithmetic would overflow or lose.

    :raises InputError: naming `where` and the module.
    """
    for name, grams in source.grams.items():
        if not (grams.energy == 0 or SMALLEST_NORM**2 < grams.energy < LARGEST_NORM**2):
            raise InputError(
                f"{where}: the update of {name} has the norm {math.sqrt(abs(grams.energy)):.3g}; "
                f"from {SMALLEST_NORM:g} to {LARGEST_NORM:g} can be fitted in float32"
            )


def leading(spectra: Mapping[str, Tensor], most: Mapping[str, int] | None) -> Mapping[str, Tensor]:
    """Of each module as many components as it may have."""
    return spectra if most is None else {name: values[: most[name]] for name, values in spectra.items()}


def local_most(source: Source, most: int | None, shared: int) -> dict[str, int] | None:
    """Greatest local rank of each module beside shared parts of this rank in all; None for any. most: greatest rank in all.

    :raises RecipeError: where the shared parts alone exceed the greatest rank.
    """
    if most is None:
        return None
    sharing = set(source.sharing) if shared else set()
    if shared > most and sharing:
        raise RecipeError(
            f"the shared parts alone are of rank {shared}, and a module may have rank {most} at most, which is that of the "
            "source's own slot where nothing else is given: give transform none, or max_rank none for a result of a larger slot",
            "transform",
            "max_rank",
        )
    return {name: most - shared if name in sharing else most for name in source.deltas}


def within(source: Source, budget: int, structure: Structure, shared: int = 0) -> Allocation:
    """Local ranks that store at most `budget` numbers, beside shared parts of rank `shared` in all."""
    most = local_most(source, structure.most_rank, shared)

    def allocation(spectra: Mapping[str, Tensor]) -> Ranks:
        spectra = leading(spectra, most)
        if structure.is_uniform:
            return allocate.uniform({name: len(v) for name, v in spectra.items()}, source.costs, budget)
        return allocate.within_budget(spectra, source.costs, budget)

    return allocation


def handed_over(local: Factors, storage: torch.dtype | None) -> Factors:
    """A finished local part in its storage dtype; None keeps it."""
    return local if storage is None else local.to(storage)


def too_small(budget: int, source: Source, needed: int, transform: str) -> RecipeError:
    """The error of a budget that the shared parts alone exceed."""
    return RecipeError(
        f"budget: {budget} numbers ({budget / source.parameters:.4g} of the LoRA) can't hold the shared parts of "
        f"--transform {transform}, which need {needed} ({needed / source.parameters:.4g}); "
        "raise --budget or use --transform none or auto",
        "budget",
    )
