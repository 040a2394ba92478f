"""Parameter counts against the figures that the paper and the authors' code give (section A.4, tables of the paper)."""

import pytest

from bslora_convert.bslora.counts import local_parameters, own_parameters, pair_parameters
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice, Transform
from bslora_convert.modules.factors import Shape
from tests.planting import plant


def model(hidden: int, key_value: int, ffn: int, layers: int) -> list[Shape]:
    """q, k, v, up and down of every layer."""
    layer = [(hidden, hidden), (key_value, hidden), (key_value, hidden), (ffn, hidden), (hidden, ffn)]
    return layer * layers


LLAMA_7B = (model(4096, 4096, 11008, 32), 32)
LLAMA_8B = (model(4096, 1024, 14336, 32), 32)
LLAMA_13B = (model(5120, 5120, 13824, 40), 40)


def total(model: tuple[list[Shape], int], transform: Transform, ranks: tuple[int, int, int]) -> int:
    shapes, layers = model
    local, intra, inter = ranks
    pairs = layers * pair_parameters(transform, intra) + pair_parameters(transform, inter)
    levels = (intra > 0) + (inter > 0)
    return local_parameters(shapes, local) + pairs + levels * sum(own_parameters(transform, shape) for shape in shapes)


@pytest.mark.parametrize(
    ("model", "published"), [(LLAMA_7B, 14_024_704), (LLAMA_8B, 14_155_776), (LLAMA_13B, 21_954_560)]
)
def test_plain_lora_of_rank_8(model: tuple[list[Shape], int], published: int) -> None:
    assert local_parameters(model[0], 8) == published


@pytest.mark.parametrize(
    ("model", "ranks", "expected"),
    [
        (LLAMA_7B, (2, 4, 32), 7_028_736),
        (LLAMA_8B, (2, 4, 16), 7_667_712),
        (LLAMA_13B, (2, 4, 8), 10_133_504),
        (LLAMA_8B, (2, 1, 2), 4_513_792),
        (LLAMA_8B, (4, 8, 32), 15_335_424),
        (LLAMA_8B, (8, 16, 32), 29_753_344),
    ],
)
def test_slice_sharing(model: tuple[list[Shape], int], ranks: tuple[int, int, int], expected: int) -> None:
    assert total(model, Slice.covering(model[0]), ranks) == expected


@pytest.mark.parametrize(
    ("model", "size", "ranks", "expected"),
    [
        (LLAMA_7B, 1024, (2, 8, 16), 8_224_768),
        (LLAMA_7B, 512, (2, 8, 16), 7_618_560),
        (LLAMA_7B, 2048, (2, 8, 16), 9_437_184),
        (LLAMA_8B, 1024, (2, 4, 16), 8_028_160),
        (LLAMA_13B, 1024, (2, 4, 8), 12_140_544),
        (LLAMA_8B, 1024, (4, 16, 32), 12_386_304),
    ],
)
def test_gate_transformation(
    model: tuple[list[Shape], int], size: int, ranks: tuple[int, int, int], expected: int
) -> None:
    assert total(model, Gate(size), ranks) == expected


@pytest.mark.parametrize(
    ("model", "size", "ranks", "expected"),
    [
        (LLAMA_7B, 256, (2, 4, 16), 3_593_600),
        (LLAMA_7B, 256, (2, 8, 16), 3_659_136),
        (LLAMA_7B, 64, (2, 4, 16), 3_579_392),
        (LLAMA_7B, 128, (2, 4, 16), 3_570_432),
        (LLAMA_8B, 256, (2, 8, 32), 3_700_224),
        (LLAMA_13B, 256, (2, 8, 16), 5_682_112),
        (LLAMA_8B, 256, (8, 16, 16), 14_439_936),
        (LLAMA_8B, 256, (4, 8, 8), 7_226_880),
    ],
)
def test_kronecker_extension(
    model: tuple[list[Shape], int], size: int, ranks: tuple[int, int, int], expected: int
) -> None:
    assert total(model, Kronecker(size), ranks) == expected


@pytest.mark.parametrize("transform", [Kronecker(16), Slice(128, 128), Gate(24)])
def test_a_form_counts_what_it_holds(transform: Kronecker | Slice | Gate) -> None:
    form = plant(transform, (2, 4, 8), layers=3)
    shapes = [module.shape for module in form.modules.values()]
    assert form.parameters == total((shapes, 3), transform, (2, 4, 8))
    assert form.parameters == sum(tensor.numel() for tensor in form.tensors())
    assert sum(form.parts_parameters().values()) == form.parameters


@pytest.mark.parametrize(("transform", "rank"), [(Kronecker(16), 14), (Slice(128, 128), 14), (Gate(24), 4)])
def test_expanded_rank_is_known_without_an_svd(transform: Kronecker | Slice | Gate, rank: int) -> None:
    form = plant(transform, (2, 4, 8), layers=1)
    for name in form.modules:
        assert form.expanded_rank(name) == form.delta(name).rank == rank
