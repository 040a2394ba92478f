"""Stored numbers against the figures that the papers and others' comparisons with them give; from counts alone."""

import pytest

from bslora_convert.baselines.prolora import prolora_parameters
from bslora_convert.baselines.sharelora import unit_of
from bslora_convert.baselines.tied_lora import tl6_parameters
from bslora_convert.baselines.vb_lora import vb_parameters, vb_trained
from bslora_convert.baselines.vb_pieces import vector_length
from bslora_convert.baselines.vera import vera_parameters
from bslora_convert.modules.factors import Shape


def kinds(hidden: int, key_value: int, ffn: int) -> list[Shape]:
    """q, k, v, up and down."""
    return [(hidden, hidden), (key_value, hidden), (key_value, hidden), (ffn, hidden), (hidden, ffn)]


LLAMA_7B = (kinds(4096, 4096, 11008), 32)
LLAMA_8B = (kinds(4096, 1024, 14336), 32)
LLAMA_13B = (kinds(5120, 5120, 13824), 40)
Model = tuple[list[Shape], int]


def modules(model: Model) -> dict[str, Shape]:
    shapes, layers = model
    return {f"{layer}.{kind}": shape for layer in range(layers) for kind, shape in enumerate(shapes)}


def test_sharelora_of_rank_1() -> None:
    shapes, layers = LLAMA_8B
    flipped = [(width, out) for out, width in shapes]
    assert sum(unit_of([shape] * layers) for shape in shapes) == 817_152
    assert sum(unit_of([shape] * layers) for shape in flipped) == 1_007_616
    assert sum(unit_of([shape]) for shape in shapes) == 55_296


@pytest.mark.parametrize(("model", "published"), [(LLAMA_7B, 438_272), (LLAMA_8B, 442_368), (LLAMA_13B, 548_864)])
def test_tied_lora_tl5(model: Model, published: int) -> None:
    assert 8 * sum(unit_of([shape]) for shape in model[0]) == published


@pytest.mark.parametrize(("model", "published"), [(LLAMA_7B, 1_316_096), (LLAMA_8B, 1_230_080), (LLAMA_13B, 1_922_624)])
def test_tied_lora_tl6(model: Model, published: int) -> None:
    assert sum(tl6_parameters(shape, model[1], 8) for shape in model[0]) == published


@pytest.mark.parametrize(
    ("model", "rank", "published"), [(LLAMA_7B, 64, 886_784), (LLAMA_8B, 64, 796_672), (LLAMA_13B, 128, 1_397_760)]
)
def test_vera(model: Model, rank: int, published: int) -> None:
    assert vera_parameters(modules(model), rank) == published


@pytest.mark.parametrize(("model", "published"), [(LLAMA_7B, 2_488_320), (LLAMA_8B, 2_511_360), (LLAMA_13B, 3_882_240)])
def test_vb_lora_as_it_is_trained(model: Model, published: int) -> None:
    assert vector_length(modules(model)) == 256
    assert vb_trained(modules(model), 4, 256, 90) == published


def test_vb_lora_as_it_is_stored() -> None:
    assert vb_parameters(modules(LLAMA_7B), 4, 256, 90) == 90 * 256 + 3 * 4 * 6848


@pytest.mark.parametrize(("unshared", "shared"), [(0, 4), (1, 2), (2, 0)])
def test_prolora_of_half_as_many_numbers_a_shared_rank(unshared: int, shared: int) -> None:
    lora_of_rank_2 = 2 * sum(out + width for out, width in modules(LLAMA_7B).values())
    assert prolora_parameters(modules(LLAMA_7B), unshared, shared) == lora_of_rank_2
    assert prolora_parameters({"m": (24, 25)}, 1, 2) == 24 + 24 + 25 + 2 * 25  # nothing divides 25
