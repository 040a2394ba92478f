"""Adapters planted in other forms, and errors of what was fitted to them."""

from collections.abc import Callable, Mapping
from functools import partial

import torch

from bslora_convert.baselines.baseline import Fitted
from bslora_convert.baselines.prolora import Chunks, RolledSide, prolora_parameters
from bslora_convert.baselines.tied_lora import tl6_parameters
from bslora_convert.baselines.vb_lora import vb_parameters
from bslora_convert.baselines.vb_pieces import PieceLayout
from bslora_convert.baselines.vector_bank import Mixing
from bslora_convert.baselines.vera import projections, vera_parameters
from bslora_convert.fit.source import Source, measure
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import residual_energy
from tests.planting import Product

KINDS: dict[str, Shape] = {"self_attn.q_proj": (24, 24), "self_attn.k_proj": (16, 24), "mlp.down_proj": (24, 40)}
LAYERS = 4
RANK = 3

VERA_RANK = 10

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


def tied(form: str, seed: int) -> tuple[dict[str, Factors], int]:
    """Modules of a form that ties factors, and the numbers that it stores."""
    random = drawn(seed)
    shared = {kind: Factors(random(out, RANK), random(RANK, width)) for kind, (out, width) in KINDS.items()}
    one_a = random(RANK, 24)
    parameters = RANK * sum(out + width for out, width in KINDS.values())
    if form == "sharelora_a":
        parameters = RANK * sum(width + LAYERS * out for out, width in KINDS.values())
    if form == "sharelora_b":
        parameters = RANK * sum(LAYERS * width + out for out, width in KINDS.values())
    if form == "sharelora_a_qkv":
        parameters = RANK * (24 + LAYERS * (24 + 16 + 24 + 40))
    if form == "tied_lora_tl6":
        parameters = sum(tl6_parameters(shape, LAYERS, RANK) for shape in KINDS.values())
    modules = {}
    for name, (_, kind) in names().items():
        (out, width), pair = KINDS[kind], shared[kind]
        b, a = pair.b, pair.a
        if form == "sharelora_a":
            b = random(out, RANK)
        if form == "sharelora_b":
            a = random(RANK, width)
        if form == "sharelora_a_qkv":
            b, a = random(out, RANK), random(RANK, width) if kind == "mlp.down_proj" else one_a
        if form == "tied_lora_tl6":
            b = (1 + 0.3 * random(out))[:, None] * b * (1 + 0.3 * random(RANK))
        modules[name] = regauged(Factors(b, a), random)
    return modules, parameters


def truncated(adaptive: bool, seed: int = 0) -> tuple[dict[str, Factors], int]:
    """Modules held at rank 6 that are of rank 3, or of ranks from 1 to 6, and the numbers of those ranks."""
    random, parameters, modules = drawn(seed), 0, {}
    for index, (name, (_, kind)) in enumerate(names().items()):
        (out, width), rank = KINDS[kind], 1 + index % 6 if adaptive else RANK
        parameters += rank * (out + width)
        left, _ = torch.linalg.qr(random(out, rank))
        right, _ = torch.linalg.qr(random(width, rank))
        mixed = random(rank, 6)
        modules[name] = Factors(left @ mixed, torch.linalg.pinv(mixed) @ right.T)
    return modules, parameters


def vera_planted(seed: int = 0) -> tuple[dict[str, Factors], int]:
    """Modules between the frozen matrices of a seed, and the numbers that their scales take."""
    random = drawn(0)
    shapes = {name: KINDS[kind] for name, (_, kind) in names().items()}
    frozen = projections(shapes, VERA_RANK, seed)
    modules = {
        name: regauged(Factors(random(out)[:, None] * frozen.b[:out] * random(VERA_RANK), frozen.a[:, :width]), random)
        for name, (out, width) in shapes.items()
    }
    return modules, vera_parameters(shapes, VERA_RANK)


def bank_planted(seed: int = 0, size: int = 6) -> tuple[dict[str, Factors], int]:
    """Modules whose factors are mixed from a bank of `size` vectors, and the numbers of bank and mixture."""
    generator = torch.Generator().manual_seed(seed)
    kinds = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.down_proj": (64, 128)}
    shapes = {name: kinds[kind] for name, (_, kind) in names(kinds=kinds).items()}
    layout = PieceLayout(shapes, 4, 32)
    pieces = sum(sum(counts) for counts in layout.counts)
    bank = torch.randn(size, 32, generator=generator)
    first = torch.randint(size, (pieces,), generator=generator)
    second = (first + torch.randint(1, size, (pieces,), generator=generator)) % size
    mixing = Mixing(first, second, torch.rand(pieces, generator=generator))
    pairs = layout.joined(mixing.of(bank))
    modules = {name: Factors(b, a) for name, (b, a) in zip(shapes, pairs, strict=True)}
    return modules, vb_parameters(shapes, 4, 32, size)


def chunks_planted(seed: int = 0, unshared: int = 1, shared: int = 2) -> tuple[dict[str, Factors], int]:
    """Modules of rotated chunks beside an unshared part, and the numbers of both."""
    random, modules = drawn(seed), {}
    shapes = {name: KINDS[kind] for name, (_, kind) in names().items()}
    for name, shape in shapes.items():
        sides = RolledSide.of(shape[0], unshared, shared), RolledSide.of(shape[1], unshared, shared)
        rows = [side.shared + side.chunks * side.unshared for side in sides]
        b, a = (random(row, length // side.chunks) for row, length, side in zip(rows, shape, sides, strict=True))
        modules[name] = regauged(Chunks(b, a, sides).delta(), random)
    return modules, prolora_parameters(shapes, unshared, shared)


TIED = ("sharelora_a", "sharelora_b", "sharelora_ab", "sharelora_a_qkv", "tied_lora_tl5", "tied_lora_tl6")

PLANTED: dict[str, Callable[[], tuple[dict[str, Factors], int]]] = {
    "svd_uniform": partial(truncated, False),
    "svd_adaptive": partial(truncated, True),
    **{form: partial(tied, form, 0) for form in TIED},
    "vera": vera_planted,
    "vb_lora": bank_planted,
    "prolora": chunks_planted,
}
