"""Adapters whose initialisation is known: drawn as PEFT draws, then changed as training does."""

from collections.abc import Callable, Iterable, Mapping
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn

from bslora_convert.initialisation.drawn import Module
from bslora_convert.initialisation.found import Found
from bslora_convert.initialisation.kept import draws_at
from bslora_convert.initialisation.stream import HALF, Place
from bslora_convert.modules.factors import Shape
from tests.planting import KINDS


def draws(seed: int, places: Mapping[str, Place], widths: Mapping[str, int]) -> dict[str, np.ndarray]:
    """A₀ (rank, in) int16 of every module that has a place, in the order of the stream."""
    names = sorted(places, key=lambda name: places[name].first)
    found, _ = draws_at(seed, [(places[name].first, places[name].rank * widths[name]) for name in names])
    return {name: numbers.reshape(places[name].rank, -1) for name, numbers in zip(names, found, strict=True)}


def llama(layers: int) -> dict[str, Shape]:
    """(out, in) of the linear modules of some decoder layers."""
    return {f"model.layers.{layer}.{kind}": shape for layer in range(layers) for kind, shape in KINDS.items()}


def drawn(
    shapes: Mapping[str, Shape],
    seed: int,
    offset: int = 0,
    rank: int = 8,
    older: Callable[[Shape], None] = lambda shape: None,
) -> dict[str, Module]:
    """What PEFT makes of modules of these shapes, after some draws; `older` draws what older versions do before each."""
    torch.manual_seed(seed)
    torch.empty(offset).uniform_()
    modules = {}
    for name, (out, width) in shapes.items():
        older((out, width))
        a, _ = nn.Linear(width, rank, bias=False), nn.Linear(rank, out, bias=False)
        nn.init.kaiming_uniform_(a.weight, a=sqrt(5))
        modules[name] = Module(a.weight.detach(), out)
    return modules


def trained(
    modules: Mapping[str, Module], noise: float = 0.1, scale: float = 0.97, dtype: torch.dtype = torch.float32
) -> dict[str, Module]:
    """The modules with noise in each A, in units of its rms, and shrunk."""
    generator = torch.Generator().manual_seed(618_033_988)

    def moved(a: Tensor) -> Tensor:
        return (scale * (a + noise * a.square().mean().sqrt() * torch.randn(a.shape, generator=generator))).to(dtype)

    return {name: Module(moved(module.a), module.out, module.kind) for name, module in modules.items()}


def unseeded(modules: Mapping[str, Module], names: Iterable[str] | None = None, seed: int = 5) -> dict[str, Module]:
    """Modules whose A's (of all, or of some) come from another generator."""
    generator = np.random.default_rng(seed)
    new = dict(modules)
    for name in modules if names is None else names:
        old = modules[name]
        a = generator.uniform(-1, 1, tuple(old.a.shape)) / sqrt(old.width)
        new[name] = Module(torch.from_numpy(a).float(), old.out, old.kind)
    return new


def assert_draws(found: Found, originals: Mapping[str, Module]) -> None:
    """The draws at the places are the A's before training, within their sixteen bits."""
    numbers = draws(found.seed, found.places, {name: module.width for name, module in originals.items()})
    assert list(numbers) == list(found.places) == list(found.cosines)
    for name, a in numbers.items():
        original: Tensor = originals[name].a
        assert found.places[name].rank == len(original)
        units = original.double().numpy() * sqrt(original.shape[1])
        assert np.abs(units - (a + 0.5) / HALF).max() <= 1.01 * 2**-16, name
