"""Damaged and hostile files: one error that names file and tensor, exit code 2, and never anything else."""

import contextlib
import json
import math
import os
import pickle
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bslora_convert.errors import BsloraConvertError, InputError
from bslora_convert.lora import load_lora
from bslora_convert.lora.fields import KNOWN
from bslora_convert.modules.factors import Factors
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.verbs.compress import compress
from tests.planting import Product, random_products, write_lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora", random_products(layers=1, rank=2))


def refused(path: Path, *words: str) -> str:
    with pytest.raises(InputError) as caught:
        load_lora(path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


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


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_directory_in_place_of_a_file(lora: Path, name: str) -> None:
    (lora / name).unlink()
    (lora / name).mkdir()
    refused(lora, name, "not a regular file")


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


def test_truncated_anywhere(lora: Path) -> None:
    whole = (lora / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    offsets = {*range(1, 12), header // 2, header - 1, header, header + 1, len(whole) // 2, len(whole) - 1}
    for offset in sorted(offsets):
        (lora / WEIGHTS).write_bytes(whole[:offset])
        refused(lora, str(lora / WEIGHTS), "truncated or not a safetensors file")
    (lora / WEIGHTS).write_bytes(whole + b"\0")
    refused(lora, str(lora / WEIGHTS))
    (lora / WEIGHTS).write_bytes(whole)
    assert load_lora(lora).modules


def test_a_header_that_claims_to_be_huge(lora: Path) -> None:
    whole = (lora / WEIGHTS).read_bytes()
    for length in (1 << 40, (1 << 64) - 1):
        (lora / WEIGHTS).write_bytes(length.to_bytes(8, "little") + whole[8:])
        refused(lora, WEIGHTS)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "3",
        "null",
        '{"r": 1',
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"r": 8} trailing',
        "\ud800".encode("utf-16", "surrogatepass"),
    ],
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
        ("r", [8]),
        ("r", -4),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", float("inf")),
        ("lora_alpha", None),
        ("lora_alpha", True),
        ("lora_alpha", [16]),
        ("lora_alpha", 10**400),  # no float holds it
        ("rank_pattern", [1]),
        ("rank_pattern", {"q_proj": "x"}),
        ("rank_pattern", "q_proj"),
        ("rank_pattern", {"q_proj": 10**400}),
        ("alpha_pattern", {"q_proj": float("nan")}),
        ("alpha_pattern", {"q_proj": None}),
        ("alpha_pattern", {"(": 2}),
        ("rank_pattern", {"*": 2}),
        ("alpha_pattern", {"(?i)Q_PROJ": 2}),  # a flag that may not stand behind PEFT's own prefix
        ("alpha_pattern", {"q{99999999999999999999}": 2}),
        ("alpha_pattern", {"a" * 100_000: 2}),
    ],
)
def test_wrong_fields(lora: Path, field: str, value: Any) -> None:
    configure(lora, **{field: value})
    refused(lora, CONFIG, field)


@pytest.mark.parametrize("side", ["A", "B"])
def test_a_missing_partner(lora: Path, side: str) -> None:
    other = "B" if side == "A" else "A"
    rewrite(lora, **{KEY.replace("lora_A", f"lora_{side}"): None})
    refused(lora, str(lora / WEIGHTS), KEY.replace("lora_A", f"lora_{other}"), f"lora_{side} is missing")


def test_a_rank_clash(lora: Path) -> None:
    rewrite(lora, **{KEY: torch.zeros(3, 64)})
    refused(lora, str(lora / WEIGHTS), KEY, KEY.replace("lora_A", "lora_B"), "disagree about the rank (3 and 2)")


HEAD = "base_model.model.score.weight"


@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0)])
@pytest.mark.parametrize("key", [HEAD, KEY])
def test_empty_tensors_are_named_with_their_likely_cause(lora: Path, key: str, shape: tuple[int, ...]) -> None:
    rewrite(lora, **{key: torch.zeros(shape)})
    refused(lora, str(lora / WEIGHTS), key, "ZeRO-3")


def test_a_saved_head_of_nan_is_not_passed_on(lora: Path) -> None:
    rewrite(lora, **{HEAD: torch.tensor([1.0, float("nan")])})
    refused(lora, str(lora / WEIGHTS), HEAD, "NaN")
    rewrite(lora, **{HEAD: torch.tensor([1.0, float("-inf")])})  # a bias that forbids a token may be meant
    assert HEAD.endswith(next(iter(load_lora(lora).carried)))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_an_archive_that_unpacks_to_more_than_it_is_is_not_unpacked(lora: Path, compression: int) -> None:
    (lora / WEIGHTS).unlink()
    path = lora / "adapter_model.bin"
    torch.save({KEY: torch.zeros(1 << 20)}, lora / "plain")
    with zipfile.ZipFile(lora / "plain") as plain, zipfile.ZipFile(path, "w", compression) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    (lora / "plain").unlink()
    assert path.stat().st_size < 1 << 20
    refused(lora, str(path), "compressed")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none(lora: Path, value: float, dtype: torch.dtype) -> None:
    for key, tensor in ((KEY, torch.zeros(2, 64)), (KEY.replace("lora_A", "lora_B"), torch.zeros(64, 2))):
        whole = load_file(lora / WEIGHTS)[key]
        tensor[1, 1] = value
        rewrite(lora, **{key: tensor.to(dtype)})
        refused(lora, str(lora / WEIGHTS), key, "1 NaN or infinite")
        rewrite(lora, **{key: whole})


def test_two_infinities_of_opposite_sign_don_t_cancel(lora: Path) -> None:
    rewrite(lora, **{KEY: torch.tensor([float("inf"), float("-inf")]).repeat(2, 32)})
    refused(lora, KEY, "128 NaN or infinite")


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


def test_two_tensors_of_one_name(lora: Path) -> None:
    rewrite(lora, **{"base_model.model.score.weight": torch.zeros(2), "score.weight": torch.ones(2)})
    refused(lora, WEIGHTS, "score.weight", "second tensor")


class Payload:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.mark,)


def zipped(path: Path, payload: Payload) -> None:
    torch.save({KEY: torch.zeros(2, 64), "a": payload}, path)


def legacy(path: Path, payload: Payload) -> None:
    torch.save({KEY: torch.zeros(2, 64), "a": payload}, path, _use_new_zipfile_serialization=False)


def bare(path: Path, payload: Payload) -> None:
    path.write_bytes(pickle.dumps(payload))


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
@pytest.mark.parametrize("write", [zipped, legacy, bare])
def test_a_pickle_that_runs_code_does_not_run(lora: Path, tmp_path: Path, write: Any, name: str) -> None:
    (lora / WEIGHTS).unlink()
    mark = tmp_path / "executed"
    write(lora / name, Payload(str(mark)))
    message = refused(lora, str(lora / name), "not a file of plain tensors")
    assert "weights_only" not in message  # no advice to load it all the same
    refused(lora / name, str(lora / name))
    assert not mark.exists()
    # The file is armed: reading it carelessly does run it.
    with contextlib.suppress(Exception):
        torch.load(lora / name, weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_harmless_pickle_is_read(lora: Path, name: str) -> None:
    expected = load_lora(lora)
    torch.save(load_file(lora / WEIGHTS), lora / name)
    (lora / WEIGHTS).unlink()
    read = load_lora(lora)
    assert read.weights == lora / name
    assert list(read.modules) == list(expected.modules)
    for module, other in zip(read.modules.values(), expected.modules.values(), strict=True):
        assert torch.equal(module.b, other.b)
        assert torch.equal(module.a, other.a)


def test_trained_parameters_in_a_pickle_are_plain_numbers(lora: Path, tmp_path: Path) -> None:
    tensors = {key: torch.nn.Parameter(tensor) for key, tensor in load_file(lora / WEIGHTS).items()}
    torch.save(tensors, lora / "adapter_model.bin")
    (lora / WEIGHTS).unlink()
    assert not any(module.b.requires_grad for module in load_lora(lora).modules.values())
    compress(lora, tmp_path / "out", Recipe(transform="none", budget=1.0), report_html=False)


def test_safetensors_are_preferred_to_a_pickle(lora: Path) -> None:
    (lora / "adapter_model.bin").write_bytes(b"junk")
    assert load_lora(lora).weights == lora / WEIGHTS


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {KEY: 3},
        {3: torch.zeros(2)},
        {KEY: torch.zeros(2, 64, device="meta")},
        {KEY: torch.zeros(2, 64).to_sparse()},
        {KEY: torch.zeros(1).expand(1 << 20, 1 << 20)},  # a terabyte in a file of a kilobyte
    ],
    ids=["list", "number", "unnamed", "meta", "sparse", "expanded"],
)
def test_a_bin_file_of_something_else(lora: Path, content: Any) -> None:
    (lora / WEIGHTS).unlink()
    torch.save(content, lora / "adapter_model.bin")
    if isinstance(content, list):
        refused(lora, "adapter_model.bin", "a dictionary of tensors is expected, found list")
    else:
        refused(lora, "adapter_model.bin", f"entry {next(iter(content))!r} is not a named tensor")


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


def refused_at_all(lora: Path) -> None:
    with pytest.raises(BsloraConvertError) as caught:
        load_lora(lora)
    assert str(lora) in str(caught.value)


def tiny(place: str) -> Path:
    return write_lora(Path(place) / "lora", random_products(layers=1, rank=1, kinds={"q": (3, 4)}))


def assert_read_or_refused(lora: Path) -> None:
    try:
        adapter = load_lora(lora)
    except BsloraConvertError as error:
        assert str(lora) in str(error)
        return
    for module in adapter.modules.values():
        assert module.b.isfinite().all()
        assert module.a.isfinite().all()
        assert math.isfinite(module.scaling)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), file=st.sampled_from([WEIGHTS, CONFIG, "adapter_model.bin", "adapter_model.pt"]))
@pytest.mark.filterwarnings("ignore")
def test_damaged_bytes_raise_nothing_else(data: st.DataObject, file: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        lora = tiny(place)
        if not file.endswith((".safetensors", ".json")):
            torch.save(load_file(lora / WEIGHTS), lora / file, _use_new_zipfile_serialization=file.endswith(".bin"))
            (lora / WEIGHTS).unlink()
        content = bytearray((lora / file).read_bytes())
        for _ in range(data.draw(st.integers(1, 6))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content)))]
        (lora / file).write_bytes(content)
        assert_read_or_refused(lora)


NUMBERS = st.integers(-3, 40) | st.sampled_from([10**30, -(10**400), 1 << 63]) | st.floats()
WORDS = st.text(max_size=8) | st.sampled_from(
    ["LORA", "none", "pissa", "q", ".*q", "(", "a|b", "[", "(?i)q", "all-linear"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(sorted(KNOWN)), VALUES, min_size=1, max_size=3))
def test_wrong_values_of_any_field_raise_nothing_else(changes: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        lora = tiny(place)
        configure(lora, **changes)
        assert_read_or_refused(lora)


@settings(max_examples=200, deadline=None)
@given(
    dtype=st.sampled_from(["F64", "F32", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "F8_E8M0", "F4", "C64", "X"]),
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 1 << 31, 1 << 63, -1]), max_size=5),
    size=st.integers(0, 64),
    name=st.sampled_from(
        ["q.lora_A.weight", "q.lora_B.weight", "q.lora_embedding_A", "q.lora_E", "lora_A.weight", "", "."]
    ),
)
def test_wrong_headers_raise_nothing_else(dtype: str, shape: list[int], size: int, name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        lora = tiny(place)
        header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
        (lora / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
        refused_at_all(lora)


@pytest.mark.parametrize("scale", [1e20, 1e-30])
@pytest.mark.parametrize("transform", ["none", "ke", "ss"])
def test_magnitudes_that_float32_can_not_fit_are_named(tmp_path: Path, scale: float, transform: str) -> None:
    products = random_products(layers=1, rank=2)
    name = "model.layers.0.mlp.up_proj"
    products[name] = Product(Factors(products[name].held.b * scale, products[name].held.a))
    lora = write_lora(tmp_path / "lora", products)
    with pytest.raises(InputError, match=r"mlp\.up_proj has the norm"):
        compress(lora, tmp_path / "out", Recipe(transform=transform), report_html=False)


def test_a_scaling_beyond_reason_is_named(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1), alpha=1e300)
    refused(lora, "the scaling of")
