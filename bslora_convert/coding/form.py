"""A form in codes: widths for all of it within a number of bits, shared parts first, local parts fitted to what those leave.

1. items: components of every module's T = ΔW − shared parts (SVD), and vectors of the shared pairs, kernels and gates
2. widths for all of them at one price a bit (`allocation`)
3. shared parts are coded; T is taken again, against them as decoded; the bits that are left buy local components anew
4. each module's local part is coded and refitted (`encode.code_pair`)
5. where updates are to be unbiased (`fit.gain`), each module's scale goes into the scales of codes: those of its local B and of
   the kernel or gate that carries its shared terms

Where bits are spent. Within bits, and where updates are to be unbiased, behaviour counts and not the error of the weights. Noise
of variance ν in every entry of a module (out, in) changes the loss by ν E‖x‖²‖g‖², and that power differs little from module to
module (by about two in the mean of each kind of SmolLM2-135M's), whatever their sizes. So an error counts by
1 / (out · in), damped by the power EVEN, as what is truncated is no noise; docs/precision.md has what that is worth. In a
metric of prompts, and where an error is asked for, errors count as they are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from bslora_convert.bslora.codes.coded import Coded, bits_of, from_vectors, to_vectors, vectors_shape
from bslora_convert.bslora.codes.widths import WIDTHS
from bslora_convert.bslora.form import BsloraForm, Module, Path
from bslora_convert.bslora.layout import Layout
from bslora_convert.coding.allocation import Items, within_bits, within_loss
from bslora_convert.coding.encode import Encoded, code_pair, distortions, encode, lost_shares
from bslora_convert.errors import RecipeError
from bslora_convert.fit.gain import carrier_of, strength_in
from bslora_convert.fit.in_metric import residual_terms, shared_rank, svd_in
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.metric.metric import PLAIN, Metric
from bslora_convert.modules.factors import Factors, Shape, add
from bslora_convert.modules.lowrank import Grams, ProductSvd, residual_energy
from bslora_convert.process.progress import Progress, silent

Found = TypeVar("Found")

EVEN = 0.4
PAIRS = tuple(product(range(len(WIDTHS)), repeat=2))
WIDTHS_OF = tuple(product(WIDTHS, repeat=2))


@dataclass(frozen=True, slots=True)
class Aim:
    """What a coded form may take and lose. bits: of everything that is coded. lost: energy; the fewest bits that reach it.

    width: one width for everything. ranks: each module's local rank, given; the components are then not chosen.
    most_rank: greatest rank of a module, its shared parts counted. unbiased: every update as strong as the original's.
    hollow: widths alone are wanted, and what they promise to lose: no number is coded.
    """

    bits: int | None = None
    lost: float | None = None
    width: int | None = None
    ranks: Mapping[str, int] | None = None
    most_rank: int | None = None
    unbiased: bool = False
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class CodedForm:
    """A form decoded in the storage dtype, its tensors' codes by key, what it loses (float32) and the bits of its codes."""

    form: BsloraForm
    tensors: Mapping[str, Coded]
    lost: float
    bits: int


@dataclass(slots=True)
class _Counter:
    """Passes things on and says how many there have been."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, things: Iterable[Found]) -> Iterator[Found]:
        for thing in things:
            self.done += 1
            self.progress("coding", self.done, self.total)
            yield thing


@dataclass(frozen=True, slots=True)
class _Local:
    """A module's components as its SVD gives them, and their options' bits and losses.

    Vectors are made when they are coded, and forgotten: written out, those of all modules take several times the source's bytes.
    """

    svd: ProductSvd
    items: Items


@dataclass(frozen=True, slots=True)
class _Done:
    """A module in codes: decoded in the storage dtype, its tensors' codes by key, what it loses (float32)."""

    module: Module
    tensors: Mapping[str, Coded]
    lost: float


def code_form(
    source: Source, form: BsloraForm, aim: Aim, storage: torch.dtype, progress: Progress = silent
) -> CodedForm:
    """The form in codes. form: its shared parts are coded as they are, its local parts are made anew.

    progress: counts modules, once for each time that they are gone through.

    :raises RecipeError: when not even the least codes fit in the bits.
    """
    counted = _Counter(progress, (3 if form.shared else 2) * len(form.modules))
    weights = _weights(source, aim)
    locals_ = _locals(source, form, aim, weights, counted)
    shared = _shared_items(form, weights)
    chosen = _choose(
        _joined([*(shared.items() and [_stack(shared, aim)]), *(local.items for local in locals_.values())]), aim
    )
    taken = 0
    tensors: dict[str, Coded] = {}
    if aim.hollow:
        return _hollow(form, shared, locals_, chosen, storage)
    if shared:
        form, tensors, taken = _coded_shared(form, shared, chosen)
        locals_ = _locals(source, form, aim, weights, counted)
        rest = None if aim.bits is None else aim.bits - taken
        chosen = _choose(_joined([local.items for local in locals_.values()]), replace(aim, bits=rest))
    done = _coded_modules(source, form, locals_, chosen, tensors, aim.unbiased, storage, counted)
    for one in done.values():
        tensors |= one.tensors
    decoded = replace(form, modules={name: one.module for name, one in done.items()}).to(storage)
    ordered = {key: tensors[key] for key, _ in Layout.of(decoded).tensors()}
    return CodedForm(decoded, ordered, sum(one.lost for one in done.values()), sum(map(_bits, ordered.values())))


def _hollow(
    form: BsloraForm, shared: Mapping[tuple[str, int], object], locals_: Mapping[str, _Local], chosen: np.ndarray,
    storage: torch.dtype,
) -> CodedForm:  # fmt: skip
    """The widths chosen, over codes of nothing."""
    rows: dict[str, list[int]] = {}
    for (key, _), option in zip(shared, chosen, strict=False):
        rows.setdefault(key, []).append(WIDTHS[option])
    modules, lost, at = {}, 0.0, len(shared)
    for name, local in locals_.items():
        options = chosen[at : at + len(local.items.bits)]
        lost += local.items.lost_at(options)
        at += len(options)
        kept = [WIDTHS_OF[option - 1] for option in options if option]
        rows[f"{name}.bslora_local_B"], rows[f"{name}.bslora_local_A"] = (
            [pair[side] for pair in kept] for side in (0, 1)
        )
        out, width = form.modules[name].shape
        empty = Factors(torch.empty(out, len(kept), dtype=storage), torch.empty(len(kept), width, dtype=storage))
        modules[name] = replace(form.modules[name], local=empty)
    sized = replace(form, modules=modules)
    tensors = {key: Coded.hollow(rows[key], vectors_shape(key, shape)[1]) for key, shape in Layout.of(sized).tensors()}
    return CodedForm(sized, tensors, lost, sum(map(_bits, tensors.values())))


def _bits(coded: Coded) -> int:
    return sum(bits_of(coded.codes.shape[1], width) for width in coded.widths.tolist())


def _choose(items: Items, aim: Aim) -> np.ndarray:
    if aim.lost is not None:
        found = within_loss(items, aim.lost)
        if aim.bits is None or items.bits_at(found) <= aim.bits:
            return found
    if aim.bits is None:
        return items.at(0.0)
    chosen = within_bits(items, aim.bits)
    if chosen is None:
        raise RecipeError(
            f"bytes: {max(aim.bits, 0) // 8} bytes can't hold the least codes of the shared parts; "
            "raise --bytes or use --transform none",
            "bytes",
        )
    return chosen


def _locals(
    source: Source, form: BsloraForm, aim: Aim, weights: Mapping[str, float], counted: _Counter
) -> dict[str, _Local]:
    """What every module's local part has to hold, measured in its metric. weights: what an error in each module counts for."""

    def local(name: str) -> _Local:
        metric, module = source.metric(name), form.modules[name]
        target = cache(
            lambda: add(*residual_terms(source.deltas[name], form, name))
        )  # not needed plainly, nothing shared
        svd = svd_in(metric, target()) if module.paths else source.svds[name]
        rank = None if aim.ranks is None else aim.ranks[name]
        most = min(module.shape)
        if aim.most_rank is not None:
            most = min(most, max(aim.most_rank - shared_rank(form, name), 0))
        count = min(int((svd.energies > 0).sum()), most) if rank is None else min(rank, len(svd.energies))
        left, right = _lost_shares(metric, module.shape, lambda: svd.truncate([target()], count))
        energies = weights[name] * svd.energies[:count].double().cpu().numpy()
        return _Local(svd, _items(energies, module.shape, left, right, aim))

    return dict(zip(form.modules, counted(each(local, form.modules)), strict=True))


def _weights(source: Source, aim: Aim) -> dict[str, float]:
    """What an error in each module counts for."""
    even = aim.unbiased and aim.lost is None and not source.metrics
    return {name: (out * width) ** -EVEN if even else 1.0 for name, (out, width) in source.shapes.items()}


def _lost_shares(metric: Metric, shape: Shape, start: Callable[[], Factors]) -> tuple[np.ndarray, np.ndarray]:
    """D of the vectors of each side at every width, (count, widths), or one row for all of them. start: makes the vectors."""
    if metric is PLAIN:
        out, width = (distortions(side).numpy()[None] for side in shape)
        return out, width
    made = start()
    return lost_shares(made.b.T, metric.left).numpy(), lost_shares(made.a, metric.right).numpy()


def _items(energies: np.ndarray, shape: Shape, left: np.ndarray, right: np.ndarray, aim: Aim) -> Items:
    """Options of a module's components, left out first. left, right: D of each side."""
    dropped = 0.0 if aim.ranks is None else math.inf
    kept = energies[:, None, None] * (1 - (1 - left[:, :, None]) * (1 - right[:, None, :]))
    if aim.width is not None:
        other = np.array(WIDTHS) != aim.width
        kept[:, other[:, None] | other] = np.inf
    taken = np.add.outer(*([float(bits_of(length, width)) for width in WIDTHS] for length in shape)).reshape(1, -1)
    bits = np.pad(np.broadcast_to(taken, (len(energies), len(PAIRS))), ((0, 0), (1, 0)))
    return Items(bits, np.column_stack([np.maximum(energies, dropped), kept.reshape(-1, len(PAIRS))]))


def _coded_modules(
    source: Source, form: BsloraForm, locals_: Mapping[str, _Local], chosen: np.ndarray, shared: Mapping[str, Coded],
    unbiased: bool, storage: torch.dtype, counted: _Counter,
) -> dict[str, _Done]:  # fmt: skip
    """Every module, one after the other. chosen: an option for each component of all; shared: codes of what is shared."""
    ends = np.cumsum([len(local.items.bits) for local in locals_.values()])
    options = dict(zip(locals_, np.split(chosen, ends[:-1]), strict=True))

    def coded(name: str) -> _Done:
        metric, target = source.metric(name), add(*residual_terms(source.deltas[name], form, name))
        kept = [k for k, option in enumerate(options[name]) if option]
        b_widths, a_widths = ([WIDTHS[PAIRS[options[name][k] - 1][side]] for k in kept] for side in (0, 1))
        start = locals_[name].svd.truncate([target], len(options[name]))
        pair = code_pair(target, Factors(start.b[:, kept], start.a[kept]), b_widths, a_widths, metric)
        local_a, local_b = f"{name}.bslora_local_A", f"{name}.bslora_local_B"
        module = replace(form.modules[name], local=pair.factors())
        done = _Done(module, {local_a: pair.a.coded, local_b: pair.b.coded}, pair.lost)
        done = _unbiased(source, form, name, done, pair.b, shared) if unbiased else done
        return replace(done, module=replace(done.module, local=done.module.local.to(storage)))

    return dict(zip(locals_, counted(each(coded, locals_)), strict=True))


def _unbiased(
    source: Source, form: BsloraForm, name: str, done: _Done, b: Encoded, shared: Mapping[str, Coded]
) -> _Done:
    """A module with its update unbiased, as its codes decode that take the scale: those of its B, and of what is shared."""
    module = done.module
    scale = strength_in(source, replace(form, modules={name: module}), name).scale
    if scale == 1:
        return done
    carrier, b = carrier_of(form), b.scaled(scale)
    tensors = {**done.tensors, f"{name}.bslora_local_B": b.coded}
    paths = dict(module.paths)
    for level, path in module.paths.items():
        if carrier is not None:
            own, before = f"{name}.bslora_{level}_own_{carrier}", path.own[carrier]
            tensors[own] = shared[own].scaled(scale)
            numbers = from_vectors(own, tensors[own].decode(), tuple(before.shape)).to(before.device)
            paths[level] = replace(path, own={**path.own, carrier: numbers})
    module = replace(module, local=replace(module.local, b=b.decode().T), paths=paths)
    metric = source.metric(name)
    target = metric.weighed(source.deltas[name].factors())
    found = replace(form, modules={name: module}).delta(name)
    return _Done(module, tensors, residual_energy(target, Grams.of(target), metric.weighed(found)))


def _shared_items(form: BsloraForm, weights: Mapping[str, float]) -> dict[tuple[str, int], tuple[Tensor, float]]:
    """Vectors of the shared tensors with the energy that each stands for, weighed by module: (key, row) -> (vector, energy)."""
    layout = Layout.of(form)
    found: dict[tuple[str, int], tuple[Tensor, float]] = {}
    for (level, group), owner in layout.owners.items():
        pair = form.pair(level, group)
        members = [
            name
            for name, module in form.modules.items()
            if level in module.paths and module.paths[level].group == group
        ]
        for j in range(pair.rank):
            one = replace(form, shared={level: {group: Factors(pair.b[:, j : j + 1], pair.a[j : j + 1])}})
            parts = {name: part for name in members if (part := one.part(name, level)) is not None}
            energy = sum(weights[name] * Grams.of(part).energy for name, part in parts.items())
            for side, tensor in (("A", pair.a), ("B", pair.b.T)):
                found[f"{owner}.bslora_{level}_{side}", j] = (tensor[j], energy)
        for name in members:
            part = form.part(name, level)
            assert part is not None  # a member has the path
            energy = weights[name] * Grams.of(part).energy
            for own, tensor in form.modules[name].paths[level].own.items():
                found[f"{name}.bslora_{level}_own_{own}", 0] = (tensor.reshape(-1), energy)
    return found


def _stack(shared: Mapping[tuple[str, int], tuple[Tensor, float]], aim: Aim) -> Items:
    bits = np.stack([[bits_of(vector.numel(), width) for width in WIDTHS] for vector, _ in shared.values()]).astype(
        float
    )
    lost = np.stack([energy * lost_shares(vector.float()[None])[0].numpy() for vector, energy in shared.values()])
    if aim.width is not None:
        lost[:, [width != aim.width for width in WIDTHS]] = np.inf
    return Items(bits, lost)


def _joined(parts: Sequence[Items]) -> Items:
    columns = max(part.bits.shape[1] for part in parts)

    def filled(array: np.ndarray) -> np.ndarray:
        return np.pad(array, ((0, 0), (0, columns - array.shape[1])), constant_values=np.inf)

    return Items(
        np.concatenate([filled(part.bits) for part in parts]), np.concatenate([filled(part.lost) for part in parts])
    )


def _coded_shared(
    form: BsloraForm, shared: Mapping[tuple[str, int], tuple[Tensor, float]], chosen: np.ndarray
) -> tuple[BsloraForm, dict[str, Coded], int]:
    """The form with its shared parts decoded from the codes chosen, those codes, and their bits."""
    widths: dict[str, list[int]] = {}
    for (key, _), option in zip(shared, chosen[: len(shared)], strict=True):
        widths.setdefault(key, []).append(WIDTHS[option])
    tensors: dict[str, Coded] = {}

    def coded(key: str, tensor: Tensor) -> Tensor:
        found = encode(to_vectors(key, tensor), widths[key])
        tensors[key] = found.coded
        return from_vectors(key, found.decode(), tuple(tensor.shape)).to(tensor.device)

    owners = Layout.of(form).owners
    pairs: dict[str, dict[str, Factors]] = {}
    for (level, group), owner in owners.items():
        pair, prefix = form.pair(level, group), f"{owner}.bslora_{level}"
        pairs.setdefault(level, {})[group] = Factors(coded(f"{prefix}_B", pair.b), coded(f"{prefix}_A", pair.a))
    modules: dict[str, Module] = {}
    for name, module in form.modules.items():
        paths = {
            level: Path(path.group, {own: coded(f"{name}.bslora_{level}_own_{own}", t) for own, t in path.own.items()})
            for level, path in module.paths.items()
        }
        modules[name] = replace(module, paths=paths)
    return BsloraForm(form.transform, modules, pairs), tensors, sum(map(_bits, tensors.values()))
