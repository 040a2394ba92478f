"""`compress --bytes` and `--bits` as a user meets them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from bslora_convert import Recipe, compress, expand, inspect, load_compact
from bslora_convert.cli import main
from bslora_convert.errors import InputError, RecipeError, ThresholdMissed
from bslora_convert.lora import load_lora
from bslora_convert.modules.factors import Factors
from tests.conftest import FIXTURES
from tests.planting import Product, random_products, write_lora

TINY = FIXTURES / "tiny" / "gsm8k"
WEIGHTS = "adapter_model.safetensors"


@pytest.mark.parametrize("transform", ["ke", "none", "auto"])
@pytest.mark.parametrize("share", [0.5, 0.0625])
def test_the_file_is_never_larger_than_asked_and_says_what_it_is(tmp_path: Path, transform: str, share: float) -> None:
    arguments = [
        "compress",
        str(TINY),
        str(tmp_path / "out"),
        "--transform",
        transform,
        "--bytes",
        str(share),
        "--json",
        "--no-report-html",
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    size = (tmp_path / "out" / WEIGHTS).stat().st_size
    assert record["compact"]["bytes"] == size <= share * (TINY / WEIGHTS).stat().st_size
    assert record["weight"]["relative_error"] < record["baselines"]["svd_adaptive"]["relative_error"]
    assert record["coding"]["bound"] < record["weight"]["relative_error"]
    parts = record["coding"]["widths_by_part"]
    assert {"self_attn.q_proj", "mlp.down_proj"} <= set(parts) and ("intra" in parts) <= (transform != "none")
    together: Counter[str] = Counter()
    for counts in parts.values():
        together.update(counts)
    left_out = together.pop("0", 0)
    assert dict(together) == record["coding"]["widths"]
    if transform == "none":
        whole = sum(2 * module.rank for module in load_lora(TINY).modules.values())
        assert left_out + sum(together.values()) == whole
    again = compress(TINY, tmp_path / "again", Recipe(transform=transform, bytes=share), report_html=False)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert again["weight"] == record["weight"]
    assert sum(inspect(tmp_path / "out")["bytes_by_part"].values()) <= size
    for call in (["inspect", tmp_path / "out"], ["expand", tmp_path / "out", tmp_path / "lora"]):
        assert CliRunner().invoke(main, [str(word) for word in call]).exit_code == 0


def test_one_width(tmp_path: Path) -> None:
    errors = []
    for bits in (1, 4, 16):
        record = compress(
            TINY, tmp_path / str(bits), Recipe(transform="ke", ranks=(4, 1, 1), bits=bits), report_html=False
        )
        assert set(record["coding"]["widths"]) == {str(bits)}
        errors.append(record["weight"]["relative_error"])
    assert errors == sorted(errors, reverse=True)
    sixteen = compress(
        TINY, tmp_path / "float", Recipe(transform="ke", ranks=(4, 1, 1), dtype="bfloat16"), report_html=False
    )
    assert errors[-1] == pytest.approx(sixteen["weight"]["relative_error"], rel=0.01)


def test_an_error_that_one_width_can_not_reach_is_said(tmp_path: Path) -> None:
    record = compress(TINY, tmp_path / "out", Recipe(transform="none", max_error=0.3, bits=3), report_html=False)
    assert record["weight"]["relative_error"] <= 0.3
    assert set(record["coding"]["widths"]) == {"3"}
    with pytest.raises(ThresholdMissed, match="can't be reached with --bits 2"):
        compress(TINY, tmp_path / "none", Recipe(transform="none", max_error=0.05, bits=2), report_html=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_what_a_size_costs_is_forecast(tmp_path: Path, error: float) -> None:
    sizes = {(row["option"], row["value"]): row for row in inspect(TINY)["sizes"]}
    row = sizes["--max-error", error]
    record = compress(TINY, tmp_path / "error", Recipe(transform="none", max_error=error), report_html=False)
    assert record["compact"]["bytes"] == pytest.approx(row["bytes"], rel=0.06)
    row = sizes["--bytes", 0.125]
    record = compress(TINY, tmp_path / "bytes", Recipe(transform="none", bytes=0.125), report_html=False)
    assert record["weight"]["relative_error"] == pytest.approx(row["relative_error"], rel=0.06)
    assert row["command"] == f"bslora-convert compress {TINY} OUT --transform none --bytes 0.125"


def test_zero_modules_and_carried_tensors(tmp_path: Path) -> None:
    products = random_products(layers=1, rank=4)
    name = next(iter(products))
    zero = products[name].held
    products[name] = Product(type(zero)(torch.zeros_like(zero.b), zero.a))
    head = {"base_model.model.lm_head.weight": torch.randn(16, 64)}
    lora = write_lora(tmp_path / "lora", products, extra=head, modules_to_save=["lm_head"])
    record = compress(lora, tmp_path / "out", Recipe(transform="none", bytes=0.3), report_html=False)
    whole, rest = 16 * 64 * 4, sum(product.held.b.nbytes + product.held.a.nbytes for product in products.values())
    assert 0.28 * rest < record["compact"]["bytes"] - whole <= 0.3 * rest  # what can't be compressed comes on top
    adapter = load_compact(tmp_path / "out")
    assert torch.equal(adapter.carried["lm_head.weight"], head["base_model.model.lm_head.weight"])
    assert adapter.form.modules[name].local.rank == 0
    expand(tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bytes": 0.0}, "bytes is 0.0"),
        ({"bytes": 1.5}, "bytes is 1.5"),
        ({"bits": 9}, "bits is 9"),
        ({"bytes": 0.5, "budget": 0.5}, "exclude each other"),
        ({"bytes": 0.5, "ranks": (1, 1, 1)}, "exclude each other"),
    ],
)
def test_wrong_use_names_the_field(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Recipe(**fields)


def test_too_small_a_share_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="bytes"):
        compress(TINY, tmp_path / "out", Recipe(transform="ke", bytes=0.004), report_html=False)
    assert not (tmp_path / "out").exists()


def change(directory: Path, **fields: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("rank", [1, 2, 8])
@pytest.mark.parametrize("share", [0.3, 0.15])
def test_small_files_are_filled(tmp_path: Path, rank: int, share: float) -> None:
    """Nearly all of the room is used, but for what one more header entry would take: sources of 12 to 60 kB."""
    lora = write_lora(tmp_path / "lora", random_products(layers=2, rank=rank), dtype=torch.float32)
    record = compress(lora, tmp_path / "out", Recipe(transform="none", bytes=share), report_html=False)
    allowed = share * record["source"]["bytes"]
    assert 0.98 * allowed - 130 <= record["compact"]["bytes"] <= allowed


def test_what_fits_is_not_refused(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1, rank=1), dtype=torch.float32)
    source = (lora / WEIGHTS).stat().st_size
    assert source < 7000
    record = compress(lora, tmp_path / "out", Recipe(transform="none", bytes=0.09), report_html=False)
    assert record["weight"]["relative_error"] < 1
    with pytest.raises(RecipeError, match="no room for codes"):
        compress(lora, tmp_path / "none", Recipe(transform="none", bytes=0.03), report_html=False)


def test_damaged_directories_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress(TINY, out, Recipe(transform="none", bytes=0.2), report_html=False)
    whole, config = load_file(out / WEIGHTS), (out / "adapter_config.json").read_text()
    for fields, words in (
        ({"coding": None}, "is missing"), ({"coding": {"version": 2, "group": 1024}}, "coding is"),
        ({"coding": {"version": 1, "group": 1024}}, "coding is"), ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"format_version": 9}, "this version reads"),
    ):  # fmt: skip
        change(out, **fields)
        with pytest.raises(InputError, match=words):
            load_compact(out)
        (out / "adapter_config.json").write_text(config)
    key = "base_model.model.bslora_widths"
    save_file(whole | {key: whole[key].flip(0)}, out / WEIGHTS)
    with pytest.raises(InputError, match="is expected"):
        load_compact(out, accept_changed=True)


@pytest.mark.parametrize(
    "fields",
    [{"shared_size": 32}, {"groups": "auto"}, {"min_shared": 8, "bytes": 0.04}],
    ids=lambda fields: next(iter(fields)),
)
def test_auto_takes_what_its_transforms_take(tmp_path: Path, fields: dict[str, Any]) -> None:
    recipe = Recipe(**{"transform": "auto", "bytes": 0.25, **fields})
    record = compress(TINY, tmp_path / "out", recipe, report_html=False)
    assert record["compact"]["byte_ratio"] <= recipe.asked.bytes  # type: ignore[operator]


def test_auto_is_as_small_as_the_best_transform_for_an_error(tmp_path: Path) -> None:
    bits = {}
    for name in ("none", "ke", "ss", "auto"):
        recipe = Recipe(transform=name, max_error=0.2, max_rank="none")
        record = compress(TINY, tmp_path / name, recipe, report_html=False)
        assert record["weight"]["relative_error"] <= 0.2
        bits[name] = record["coding"]["bits"]
    assert bits["auto"] == min(bits.values())


def test_an_error_is_used_up(tmp_path: Path) -> None:
    recipe = Recipe(transform="none", max_error=0.1)
    record = compress(TINY, tmp_path / "out", recipe, report_html=False)
    assert 0.097 < record["weight"]["relative_error"] <= 0.1


def test_ranks_can_not_be_uniform_where_bytes_choose_them() -> None:
    with pytest.raises(RecipeError, match="adaptive is allowed"):
        Recipe(bytes=0.5, local_ranks="uniform")


def test_a_module_may_be_called_anything(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1, kinds={"self_attn.my_own_proj": (48, 32)}))
    assert compress(lora, tmp_path / "out", Recipe(transform="none", bytes=0.9), report_html=False)["coding"]["bits"]


def test_a_module_of_zeros_costs_the_others_nothing(tmp_path: Path) -> None:
    products = random_products(layers=2, rank=4)
    name = next(iter(products))
    products[name] = Product(Factors(torch.zeros_like(products[name].held.b), products[name].held.a))
    lora = write_lora(tmp_path / "lora", products)
    recipe = Recipe(transform="ke", max_error=0.4, shared_size=32)
    record = compress(lora, tmp_path / "out", recipe, report_html=False)
    assert record["weight"]["relative_error"] > 0.35


def test_names_that_take_more_bytes_than_letters_count(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1))
    tensors = load_file(lora / WEIGHTS)
    tensors |= {f"base_model.model.{'雪' * 60}{number}.weight": torch.zeros(1, 1, 1, 1) for number in range(20)}
    save_file(tensors, lora / WEIGHTS)
    record = compress(lora, tmp_path / "out", Recipe(transform="none", bytes=0.7), report_html=False)
    assert record["compact"]["byte_ratio"] <= 0.7


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("bslora_scales", 3e38, "can't hold"),
        ("bslora_floats", torch.full((3,), float("nan")), "belongs to no vector|bslora_floats"),
        ("bslora_codes_5", torch.zeros(3, dtype=torch.uint8), "belongs to no module"),
    ],
)
def test_codes_that_decode_to_nothing_sensible_are_refused(tmp_path: Path, name: str, tensor: Any, words: str) -> None:
    compress(TINY, tmp_path / "out", Recipe(transform="none", ranks=(2, 0, 0), bits=3), report_html=False)
    path = tmp_path / "out" / WEIGHTS
    tensors = load_file(path)
    key = f"base_model.model.{name}"
    tensors[key] = torch.full_like(tensors[key], tensor) if isinstance(tensor, float) else tensor
    save_file(tensors, path)
    with pytest.raises(InputError, match=words):
        load_compact(tmp_path / "out", accept_changed=True)


@pytest.mark.parametrize("transform", ["ke", "ss", "gt", "none", "auto"])
@pytest.mark.parametrize(
    "size", [{"bytes": 0.5}, {"budget": 1.0}, {"max_error": 0.4}], ids=lambda size: next(iter(size))
)
def test_no_result_outgrows_the_slot_of_its_source(tmp_path: Path, transform: str, size: dict[str, float]) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=2, rank=8))
    record = compress(lora, tmp_path / "out", Recipe(transform=transform, **size), report_html=False)
    assert record["recipe"]["max_rank"] == "slot"
    assert record["compact"]["expanded_rank"] <= 8


def test_a_greatest_rank_is_kept_to_and_may_be_lifted(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=2, rank=8))
    ranks = {}
    for most in (3, "none"):
        recipe = Recipe(transform="ke", budget=1.0, max_rank=most)
        ranks[most] = compress(lora, tmp_path / str(most), recipe, report_html=False)["compact"]["expanded_rank"]
    assert ranks[3] == 3 and ranks["none"] > 8
    with pytest.raises(RecipeError, match=r"of rank 2, and a module may have rank 1 at most"):
        compress(lora, tmp_path / "never", Recipe(transform="ke", budget=1.0, max_rank=1), report_html=False)
    with pytest.raises(ThresholdMissed, match="--transform ke and --max-rank slot"):
        compress(lora, tmp_path / "never", Recipe(transform="ke", max_error=0.05), report_html=False)
    gates = compress(lora, tmp_path / "gates", Recipe(transform="gt", budget=1.0, max_rank=1), report_html=False)
    assert gates["compact"]["expanded_rank"] == 1
    with pytest.raises(RecipeError, match=r"of rank 2, and a module may have rank 1 at most"):
        compress(lora, tmp_path / "never", Recipe(transform="gt", ranks=(1, 1, 1), max_rank=1), report_html=False)
    by_hand = compress(lora, tmp_path / "hand", Recipe(transform="ke", ranks=(2, 4, 8)), report_html=False)
    assert by_hand["compact"]["expanded_rank"] == 14


def test_a_flipped_bit_of_codes_is_found_before_anything_is_decoded(tmp_path: Path) -> None:
    compress(TINY, tmp_path / "out", Recipe(transform="none", bytes=0.1), report_html=False)
    path = tmp_path / "out" / WEIGHTS
    content = bytearray(path.read_bytes())
    content[-len(content) // 3] ^= 4
    path.write_bytes(content)
    with pytest.raises(InputError, match="not the file that was written"):
        load_compact(tmp_path / "out")
