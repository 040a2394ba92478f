"""Damaged and hostile files: one error that names file and tensor, exit code 2, and never anything else."""

import json
import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bslora_convert.bslora.factors import Factors
from bslora_convert.compress import compress
from bslora_convert.errors import BsloraConvertError, InputError
from bslora_convert.lora import load_lora
from bslora_convert.recipe import Recipe
from tests.planting import Product, random_products, write_lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora", random_products(layers=1, rank=2))


def refused(path: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_lora(path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def rewrite(lora: Path, **changes: torch.Tensor | None) -> None:
    tensors: dict[str, Any] = {**load_file(lora / WEIGHTS), **changes}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, lora / WEIGHTS)


def configure(lora: Path, **changes: Any) -> None:
    config = json.loads((lora / CONFIG).read_text())
    (lora / CONFIG).write_text(json.dumps({**config, **changes}))


def test_missing_places(tmp_path: Path, lora: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no such file")
    refused(tmp_path / "lora" / "nothing.safetensors", "no such file")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, CONFIG)
    (lora / WEIGHTS).unlink()
    refused(lora, "no weights")
    lonely = tmp_path / "lonely.safetensors"
    lonely.write_bytes(b"x")
    refused(lonely, CONFIG, "scaling")


def test_several_adapters_in_one_place(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_lora(tmp_path / "both" / name, random_products(layers=1))
    refused(tmp_path / "both", "several adapters", "one", "two")


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", b"\x00" * 64, b"junk" * 100]
)
def test_what_is_no_tensor_file(lora: Path, content: bytes) -> None:
    (lora / WEIGHTS).write_bytes(content)
    refused(lora, WEIGHTS)


def test_a_pointer_says_what_to_do(lora: Path) -> None:
    (lora / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(lora, "git lfs pull")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.1, 0.5, 0.9, 0.999])
def test_truncated(lora: Path, share: float) -> None:
    whole = (lora / WEIGHTS).read_bytes()
    (lora / WEIGHTS).write_bytes(whole[: int(share * len(whole)) + 1])
    refused(lora, WEIGHTS)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "null", '{"r": 1', "[" * 100_000, "\ud800".encode("utf-16", "surrogatepass")]
)
def test_wrong_json(lora: Path, text: str | bytes) -> None:
    (lora / CONFIG).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lora, CONFIG)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("r", "8"),
        ("r", 0),
        ("r", True),
        ("r", 2.5),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", None),
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": "x"}),
        ("alpha_pattern", {"(": 2}),
        ("alpha_pattern", {"a" * 10_000: 2}),
    ],
)
def test_wrong_fields(lora: Path, field: str, value: Any) -> None:
    configure(lora, **{field: value})
    refused(lora, CONFIG, field)


def test_a_missing_partner(lora: Path) -> None:
    rewrite(lora, **{KEY: None})
    refused(lora, WEIGHTS, KEY.replace("lora_A", "lora_B"), "lora_A is missing")


def test_a_rank_clash(lora: Path) -> None:
    rewrite(lora, **{KEY: torch.zeros(3, 64)})
    refused(lora, WEIGHTS, KEY, "disagree about the rank (3 and 2)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(lora: Path, value: float) -> None:
    tensor = torch.zeros(2, 64)
    tensor[1, 7] = value
    rewrite(lora, **{KEY: tensor})
    refused(lora, WEIGHTS, KEY, "1 NaN or infinite")


def test_finite_numbers_that_overflow_a_sum_are_fine(lora: Path) -> None:
    rewrite(lora, **{KEY: torch.full((2, 64), 3e38)})
    assert load_lora(lora).modules


@pytest.mark.parametrize("shape", [(4,), (), (2, 0), (0, 64)])
def test_odd_shapes(lora: Path, shape: tuple[int, ...]) -> None:
    rewrite(lora, **{KEY: torch.zeros(shape)})
    refused(lora, WEIGHTS, KEY)


def test_no_factor_at_all(lora: Path) -> None:
    save_file({"base_model.model.x.weight": torch.zeros(2)}, lora / WEIGHTS)
    refused(lora, WEIGHTS, "no LoRA factors")


def test_two_adapters_in_one_file(lora: Path) -> None:
    rewrite(lora, **{KEY.replace("lora_A.", "lora_A.other."): torch.zeros(2, 64)})
    refused(lora, WEIGHTS, "second adapter")


class Payload:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.mark,)


def test_a_pickle_that_runs_code_does_not_run(lora: Path, tmp_path: Path) -> None:
    (lora / WEIGHTS).unlink()
    mark = tmp_path / "executed"
    torch.save({"a": Payload(str(mark))}, lora / "adapter_model.bin")
    refused(lora, "adapter_model.bin")
    (lora / "adapter_model.bin").write_bytes(pickle.dumps(Payload(str(mark))))
    refused(lora, "adapter_model.bin")
    assert not mark.exists()


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {3: torch.zeros(2)}])
def test_a_bin_file_of_something_else(lora: Path, content: Any) -> None:
    (lora / WEIGHTS).unlink()
    torch.save(content, lora / "adapter_model.bin")
    refused(lora, "adapter_model.bin")


def test_zero_deltas_and_ranks_above_the_matrix_are_fine(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    products = {
        "model.layers.0.a": Product(Factors(torch.zeros(8, 4), torch.randn(4, 6, generator=generator))),
        "model.layers.0.b": Product(
            Factors(torch.randn(3, 9, generator=generator), torch.randn(9, 5, generator=generator))
        ),
    }
    lora = write_lora(tmp_path / "lora", products)
    record = compress(lora, tmp_path / "out", Recipe(transform="none", budget=1.0), report_html=False)
    assert record["weight"]["relative_error"] < 1e-6


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), file=st.sampled_from([WEIGHTS, CONFIG]))
def test_no_damage_raises_anything_else(data: st.DataObject, file: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        lora = write_lora(Path(place) / "lora", random_products(layers=1, rank=1, kinds={"q": (3, 4)}))
        content = bytearray((lora / file).read_bytes())
        for _ in range(data.draw(st.integers(1, 6))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        (lora / file).write_bytes(
            content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
        )
        try:
            load_lora(lora)
        except BsloraConvertError as error:
            assert str(lora) in str(error)
