"""Adapters planted in other forms, and errors of what was fitted to them."""

from collections.abc import Callable, Mapping

import torch

from bslora_convert.baselines.baseline import Fitted
from bslora_convert.bslora.factors import Factors, Shape
from bslora_convert.fit.lowrank import residual_energy
from bslora_convert.fit.source import Source, measure
from tests.planting import Product

KINDS: dict[str, Shape] = {"self_attn.q_proj": (24, 24), "self_attn.k_proj": (16, 24), "mlp.down_proj": (24, 40)}
LAYERS = 4

Random = Callable[..., torch.Tensor]


def drawn(seed: int) -> Random:
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator)


def regauged(factors: Factors, random: Random) -> Factors:
    """The same product with other factors."""
    m = torch.eye(factors.rank) + 0.3 * random(factors.rank, factors.rank)
    return Factors(factors.b @ m, torch.linalg.solve(m, factors.a))


def source_of(factors: Mapping[str, Factors]) -> Source:
    return measure({name: Product(pair) for name, pair in factors.items()})


def names(layers: int = LAYERS, kinds: Mapping[str, Shape] = KINDS) -> dict[str, tuple[int, str]]:
    return {f"model.layers.{layer}.{kind}": (layer, kind) for layer in range(layers) for kind in kinds}


def random_source(rank: int = 4, seed: int = 0) -> Source:
    random = drawn(seed)
    pairs = {}
    for name, (_, kind) in names().items():
        out, width = KINDS[kind]
        pairs[name] = Factors(random(out, rank), random(rank, width))
    return source_of(pairs)


def relative_error(source: Source, fitted: Fitted) -> float:
    assert list(fitted.deltas) == list(source.deltas)
    lost = sum(
        residual_energy(delta.factors(), source.grams[name], fitted.deltas[name])
        for name, delta in source.deltas.items()
    )
    return (lost / source.energy) ** 0.5


def dense(factors: Factors) -> torch.Tensor:
    return factors.b.double() @ factors.a.double()
