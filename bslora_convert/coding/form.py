"""A form in codes: widths are planned for all of it, shared parts are coded first, local parts are fitted to what those leave.

1. components of the form, and a width for each within the size or the loss (`components`, `plan`)
2. shared parts are coded; T = ΔW − shared parts is taken again, against them as decoded; the rest buys local components anew
3. each module's local part is coded and refitted (`encode.code_pair`)
4. where updates are to be unbiased (`fit.gain`), each module's scale goes into the scales of codes: those of its local B and of
   the kernel or gate that carries its shared terms
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from bslora_convert.bslora.codes.coded import Coded, bits_in, from_vectors, to_vectors, vectors_of
from bslora_convert.bslora.form import BsloraForm, Module, Path
from bslora_convert.bslora.layout import MIX, Layout
from bslora_convert.coding.components import Components
from bslora_convert.coding.encode import CodedRows, code_pair, encode
from bslora_convert.coding.plan import Plan, plan
from bslora_convert.coding.widths import Widths
from bslora_convert.fit.gain import carrier_of, strength_in
from bslora_convert.fit.in_metric import residual_terms
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.initialisation.initial import Initial
from bslora_convert.modules.factors import Factors, add
from bslora_convert.modules.lowrank import Grams, ProductSvd, residual_energy
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.target import Target

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class CodedForm:
    """A form decoded in the storage dtype, its tensors' codes by key, what it loses in the metric (float32), the codes' bits.

    initial: the random initialisation that the codes are against, of the modules that use it; None where none does.
    """

    form: BsloraForm
    tensors: Mapping[str, Coded]
    lost: float
    bits: int
    initial: Initial | None = None


@dataclass(slots=True)
class Counter:
    """Passes things on and says how many there have been."""

    progress: Progress
    total: int
    done: int = 0

    def __call__(self, things: Iterable[Found]) -> Iterator[Found]:
        """The things, one after the other."""
        for thing in things:
            self.done += 1
            self.progress("coding", self.done, self.total)
            yield thing


@dataclass(frozen=True, slots=True)
class CodedModule:
    """A module in codes: decoded in the storage dtype, its tensors' codes by key, what it loses (float32)."""

    module: Module
    tensors: Mapping[str, Coded]
    lost: float


def code_form(
    source: Source, form: BsloraForm, target: Target, storage: torch.dtype, *,
    bits: int | None = None, lost: float | None = None, components: Components | None = None, progress: Progress = silent,
) -> CodedForm:  # fmt: skip
    """The form in codes. form: its shared parts are coded as they are, its local parts are made anew.

    bits, lost: what it may take, or lose, as of `plan`. components: of the form towards the target, where they are known.
    progress: counts modules, once for each time that they are gone through.

    :raises RecipeError: when not even the least codes fit in the bits.
    """
    rounds = 1 + bool(form.shared) + (components is None)
    counted = Counter(progress, rounds * len(form.modules))
    components = components or Components.of(source, form, target, counted)
    chosen = plan(components, bits=bits, lost=lost)
    tensors: dict[str, Coded] = {}
    if form.shared:
        form, tensors = _coded_shared(form, chosen.shared)
        components = Components.of(source, form, target, counted, shared=False)
        chosen = plan(components, bits=None if bits is None else bits - _bits(tensors.values()), lost=lost)
    made = partial(_coded_module, source, form, components, chosen, target.unbiased, tensors, storage)
    done = dict(zip(form.modules, counted(each(made, form.modules)), strict=True))
    for one in done.values():
        tensors |= one.tensors
    decoded = replace(form, modules={name: one.module for name, one in done.items()}).to(storage)
    against = [key.removesuffix(MIX) for key in tensors if key.endswith(MIX)]
    initial = None if source.initial is None else source.initial.only(against)
    ordered = {key: tensors[key] for key, _ in Layout.of(decoded, initial).stored()}
    return CodedForm(decoded, ordered, sum(one.lost for one in done.values()), _bits(ordered.values()), initial)


def _bits(tensors: Iterable[Coded]) -> int:
    return bits_in(vectors_of(tensors))


def _coded_shared(form: BsloraForm, widths: Mapping[str, Sequence[int]]) -> tuple[BsloraForm, dict[str, Coded]]:
    """The form with its shared parts decoded from codes of these widths, and those codes."""
    tensors: dict[str, Coded] = {}

    def coded(key: str, tensor: Tensor) -> Tensor:
        found = encode(to_vectors(key, tensor), widths[key])
        tensors[key] = found.coded
        return from_vectors(key, found.decode(), tuple(tensor.shape)).to(tensor.device)

    pairs: dict[str, dict[str, Factors]] = {}
    for (level, group), owner in Layout.of(form).owners.items():
        pair, prefix = form.pair(level, group), f"{owner}.bslora_{level}"
        pairs.setdefault(level, {})[group] = Factors(coded(f"{prefix}_B", pair.b), coded(f"{prefix}_A", pair.a))
    modules: dict[str, Module] = {}
    for name, module in form.modules.items():
        paths = {
            level: Path(path.group, {own: coded(f"{name}.bslora_{level}_own_{own}", t) for own, t in path.own.items()})
            for level, path in module.paths.items()
        }
        modules[name] = replace(module, paths=paths)
    return BsloraForm(form.transform, modules, pairs), tensors


def _coded_module(
    source: Source, form: BsloraForm, components: Components, chosen: Plan, unbiased: bool, shared: Mapping[str, Coded],
    storage: torch.dtype, name: str,
) -> CodedModule:  # fmt: skip
    """One module's local part, and its scale. shared: codes of what is shared."""
    metric, target = source.metric(name), add(*residual_terms(source.deltas[name], form, name))
    start, widths = _start(components.locals[name].svd, target, chosen.locals[name])
    bases = (None, None) if source.initial is None else (source.initial.base(name, "B"), source.initial.base(name))
    pair = code_pair(target, start, widths, bases, metric, unbiased)
    module, prefix = replace(form.modules[name], local=pair.factors()), f"{name}.bslora_local"
    tensors = {**pair.a.tensors(f"{prefix}_A"), **pair.b.tensors(f"{prefix}_B")}
    done = CodedModule(module, tensors, pair.lost)
    if unbiased:
        done = _unbiased(source, form, name, done, pair.b, shared)
    return replace(done, module=replace(done.module, local=done.module.local.to(storage)))


def _start(svd: ProductSvd, target: Factors, chosen: Sequence[Widths | None]) -> tuple[Factors, list[Widths]]:
    """The components that are kept, (out, r) and (r, in), and their widths."""
    kept = [k for k, widths in enumerate(chosen) if widths]
    whole = svd.truncate([target], len(chosen))
    return Factors(whole.b[:, kept], whole.a[kept]), [widths for widths in chosen if widths]


def _unbiased(
    source: Source, form: BsloraForm, name: str, done: CodedModule, b: CodedRows, shared: Mapping[str, Coded]
) -> CodedModule:
    """A module with its update unbiased, as its codes decode that take the scale: those of its B, and of what is shared."""
    module = done.module
    scale = strength_in(source, replace(form, modules={name: module}), name).scale
    if scale == 1:
        return done
    carrier, b = carrier_of(form), b.scaled(scale)
    tensors = {**done.tensors, **b.tensors(f"{name}.bslora_local_B")}
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
    return CodedModule(module, tensors, residual_energy(target, Grams.of(target), metric.weighed(found)))
