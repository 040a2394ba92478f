"""Adapters planted in a form are found again in that form, at their own size, from LoRA factors in any gauge."""

from itertools import pairwise

import pytest
import torch

from bslora_convert.baselines import BASELINES
from bslora_convert.baselines.tied_lora import fit_tl6, tl6_parameters
from bslora_convert.baselines.vb_lora import Layout, vb_parameters
from bslora_convert.baselines.vector_bank import Mixing
from bslora_convert.baselines.vera import Side, fit_scales, projections, vera_parameters
from bslora_convert.bslora.factors import Factors
from tests.baselines.planted import KINDS, LAYERS, drawn, names, random_source, regauged, relative_error, source_of

RANK = 3


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


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize(
    "form", ["sharelora_a", "sharelora_b", "sharelora_ab", "sharelora_a_qkv", "tied_lora_tl5", "tied_lora_tl6"]
)
def test_tied_factors(form: str, seed: int) -> None:
    modules, parameters = tied(form, seed)
    source = source_of(modules)
    fitted = BASELINES[form](source, parameters, torch.float32, 0)
    assert fitted.parameters <= parameters
    assert relative_error(source, fitted) < 1e-3


@pytest.mark.parametrize("form", ["svd_uniform", "svd_adaptive"])
def test_truncation_at_full_size(form: str) -> None:
    source = random_source()
    assert relative_error(source, BASELINES[form](source, source.parameters, torch.float32, 0)) < 1e-5


def test_vera_between_the_matrices_of_its_seed() -> None:
    random, rank, seed = drawn(0), 10, 7
    shapes = {name: KINDS[kind] for name, (_, kind) in names().items()}
    frozen = projections(shapes, rank, seed)
    modules = {
        name: Factors(random(out)[:, None] * frozen.b[:out] * random(rank), frozen.a[:, :width])
        for name, (out, width) in shapes.items()
    }
    source = source_of({name: regauged(pair, random) for name, pair in modules.items()})
    fitted = BASELINES["vera"](source, vera_parameters(shapes, rank), torch.float32, seed)
    assert fitted.settings["rank"] == rank
    assert relative_error(source, fitted) < 1e-3
    assert relative_error(source, BASELINES["vera"](source, fitted.parameters, torch.float32, seed + 1)) > 0.5


@pytest.mark.parametrize(("seed", "size"), [(0, 6), (1, 12)])
def test_a_bank_from_factors_that_mix_it(seed: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kinds = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "mlp.down_proj": (64, 128)}
    shapes = {name: kinds[kind] for name, (_, kind) in names(kinds=kinds).items()}
    layout = Layout(shapes, 4, 32)
    pieces = sum(sum(counts) for counts in layout.counts)
    bank = torch.randn(size, 32, generator=generator)
    first = torch.randint(size, (pieces,), generator=generator)
    second = (first + torch.randint(1, size, (pieces,), generator=generator)) % size
    mixing = Mixing(first, second, torch.rand(pieces, generator=generator))
    pairs = layout.joined(mixing.of(bank))
    source = source_of({name: Factors(b, a) for name, (b, a) in zip(shapes, pairs, strict=True)})
    fitted = BASELINES["vb_lora"](source, vb_parameters(shapes, 4, 32, size), torch.float32, 0)
    assert fitted.settings | {"trained_numbers": 0} == {"rank": 4, "vectors": size, "length": 32, "trained_numbers": 0}
    assert relative_error(source, fitted) < 1e-3


def never_rises(history: list[float], energy: float) -> bool:
    return all(after <= before + 1e-12 * energy for before, after in pairwise(history))


def test_alternation_never_rises() -> None:
    source = random_source()
    terms = [delta.factors() for name, delta in source.deltas.items() if name.endswith("q_proj")]
    energy = sum(float((term.b @ term.a).square().sum()) for term in terms)
    for rank in (1, 4, 20, 24):
        _, history = fit_tl6(terms, rank)
        assert len(history) > 1
        assert never_rises(history, energy)
    frozen = projections({"m": (24, 24)}, 40, 0)
    for rank in (1, 8, 40):
        scales, history = fit_scales(terms[0], frozen.b[:, :rank], Side.of(frozen.a[:rank]))
        assert len(history) > 1
        assert never_rises(history, energy)
        made = scales.delta(Factors(frozen.b[:, :rank].double(), frozen.a[:rank].double()))
        lost = float((terms[0].b.double() @ terms[0].a.double() - made.b @ made.a).square().sum())
        assert lost == pytest.approx(history[-1], rel=1e-6)
