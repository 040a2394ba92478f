"""What of a form is coded, piece by piece, with the bits and the loss of every width that each piece may have.

shared   vectors of the shared pairs, kernels and gates             a width each
local    components of every module's T = ΔW − shared parts (SVD)   left out, or a width for each of the two sides

Where bits are spent. Within bits, and where updates are to be unbiased, behaviour counts and not the error of the weights. Noise
of variance ν in every entry of a module (out, in) changes the loss by ν E‖x‖²‖g‖², and that power differs little from module to
module (by about two in the mean of each kind of SmolLM2-135M's), whatever their sizes. So an error counts by
1 / (out · in), damped by the power SIZE_POWER, as what is truncated is no noise; docs/precision.md has what that is worth. In a
metric of prompts, and where an error is asked for, errors count as they are.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from torch import Tensor

from bslora_convert.bslora.codes.coded import Vector, bits_of
from bslora_convert.bslora.codes.widths import WIDTHS
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.layout import Layout
from bslora_convert.coding.allocation import Hull, Items
from bslora_convert.coding.encode import lost_shares, noise_weights
from bslora_convert.coding.items import Against, component_items, rank_of
from bslora_convert.coding.widths import Widths, options
from bslora_convert.fit.in_metric import residual_terms, shared_rank, svd_in
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.metric.metric import PLAIN, Metric
from bslora_convert.modules.factors import Factors, Shape, add
from bslora_convert.modules.lowrank import Grams, ProductSvd
from bslora_convert.recipe.target import Target

SIZE_POWER = 0.4

Counted = Callable[
    [Iterable["LocalComponents"]], Iterable["LocalComponents"]
]  # passes modules on and says how many there have been
Vectors = Mapping[tuple[str, int], tuple[Tensor, float]]  # (key, row) -> (vector, energy that it stands for)


@dataclass(frozen=True, slots=True)
class LocalComponents:
    """A module's components as its SVD gives them, and their options' bits and losses.

    Vectors are made when they are coded, and forgotten: written out, those of all modules take several times the source's bytes.
    """

    shape: Shape
    svd: ProductSvd
    hull: Hull
    known: tuple[int, int] = (0, 0)

    @property
    def options(self) -> Sequence[Widths]:
        """Of each component; item k + 1 is option k, item 0 leaves the component out."""
        return options(*map(bool, self.known))

    def vectors(self, kept: Sequence[Widths]) -> list[Vector]:
        """Width and length of every vector of these components."""
        found: list[Vector] = []
        for side, (length, rank) in enumerate(zip(self.shape, self.known, strict=True)):
            found += [(widths[side][1], length) for widths in kept]
            if any(widths[side][0] for widths in kept):
                found += [(widths[side][0], rank) for widths in kept]
        return found


@dataclass(frozen=True, slots=True)
class Components:
    """Everything of one form that is coded. shared is empty once the shared parts are."""

    shared: Vectors
    locals: Mapping[str, LocalComponents]
    hull: Hull

    @classmethod
    def of(
        cls, source: Source, form: BsloraForm, target: Target, counted: Counted, *, shared: bool = True
    ) -> "Components":
        """Those of a form towards a target; the form's local parts are not looked at, but for given ranks.

        shared: whether the shared parts are still to be coded.
        """
        weights = _weights(source, target)
        locals_ = dict(
            zip(form.modules, counted(each(_local(source, form, target, weights), form.modules)), strict=True)
        )
        vectors = _vectors(form, weights) if shared else {}
        hulls = [_vector_items(vectors, target.width).hull()] if vectors else []
        return cls(vectors, locals_, Hull.joined([*hulls, *(local.hull for local in locals_.values())]))


def _local(
    source: Source, form: BsloraForm, target: Target, weights: Mapping[str, float]
) -> Callable[[str], LocalComponents]:
    """What a module's local part has to hold, measured in its metric. weights: what an error in each module counts for."""

    def local(name: str) -> LocalComponents:
        metric, module = source.metric(name), form.modules[name]
        wanted = cache(
            lambda: add(*residual_terms(source.deltas[name], form, name))
        )  # not needed plainly, nothing shared
        svd = svd_in(metric, wanted()) if module.paths else source.svds[name]
        most = min(module.shape)
        if target.most_rank is not None:
            most = min(most, max(target.most_rank - shared_rank(form, name), 0))
        given = None if target.chooses_ranks else module.local.rank
        count = min(int((svd.energies > 0).sum()), most) if given is None else min(given, len(svd.energies))
        made = cache(lambda: svd.truncate([wanted()], count))
        against = known_sides(source, name, made)
        items = component_items(
            weights[name] * svd.energies[:count].double().cpu().numpy(), module.shape, against, _noise(metric, made),
            only=target.width, needed=not target.chooses_ranks, unbiased=target.unbiased,
        )  # fmt: skip
        return LocalComponents(module.shape, svd, items.hull(), (rank_of(against[0]), rank_of(against[1])))

    return local


def _weights(source: Source, target: Target) -> dict[str, float]:
    """What an error in each module counts for."""
    by_size = target.unbiased and target.error is None and not source.metrics
    return {name: (out * width) ** -SIZE_POWER if by_size else 1.0 for name, (out, width) in source.shapes.items()}


def known_sides(source: Source, name: str, made: Callable[[], Factors]) -> tuple[Against | None, Against | None]:
    """What a module's components are against, on the sides of B and A. made: makes their vectors."""
    if source.initial is None:
        return None, None
    metric, (b, a) = source.metric(name), (source.initial.base(name, side) for side in "BA")
    return (
        None if b is None else Against.of(made().b.T, b, metric.left),
        None if a is None else Against.of(made().a, a, metric.right),
    )


def _noise(metric: Metric, made: Callable[[], Factors]) -> tuple[np.ndarray, np.ndarray] | None:
    """How noise in each side of the components counts in a metric; None plainly. made: makes the vectors."""
    if metric is PLAIN:
        return None
    vectors = made()
    return noise_weights(vectors.b.T, metric.left).numpy(), noise_weights(vectors.a, metric.right).numpy()


def _vectors(form: BsloraForm, weights: Mapping[str, float]) -> Vectors:
    """Vectors of the shared tensors, each with the energy that it stands for, weighed by module."""
    found: dict[tuple[str, int], tuple[Tensor, float]] = {}
    for (level, group), owner in Layout.of(form).owners.items():
        pair = form.pair(level, group)
        members = [
            n for n, module in form.modules.items() if level in module.paths and module.paths[level].group == group
        ]

        def energy(shared: BsloraForm, name: str, level: str = level) -> float:
            part = shared.part(name, level)
            return 0.0 if part is None else weights[name] * Grams.of(part).energy

        for j in range(pair.rank):
            one = replace(form, shared={level: {group: Factors(pair.b[:, j : j + 1], pair.a[j : j + 1])}})
            total = sum(energy(one, name) for name in members)
            for side, tensor in (("A", pair.a), ("B", pair.b.T)):
                found[f"{owner}.bslora_{level}_{side}", j] = (tensor[j], total)
        for name in members:
            whole = energy(form, name)
            for own, tensor in form.modules[name].paths[level].own.items():
                found[f"{name}.bslora_{level}_own_{own}", 0] = (tensor.reshape(-1), whole)
    return found


def _vector_items(vectors: Vectors, only: int | None) -> Items:
    """Options of the shared vectors: a width each. only: the one width that is allowed."""
    bits = np.array([[float(bits_of(v.numel(), width)) for width in WIDTHS] for v, _ in vectors.values()])
    lost = np.stack([energy * lost_shares(vector.float()[None])[0].numpy() for vector, energy in vectors.values()])
    if only is not None:
        lost[:, [width != only for width in WIDTHS]] = np.inf
    return Items(bits, lost)
