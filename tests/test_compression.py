"""The main job on the real adapter: budgets, rivals, and a report that a dense recomputation confirms."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bslora_convert.bslora.storage import load_compact
from bslora_convert.errors import InputError, OutputError, RecipeError, ThresholdMissed
from bslora_convert.lora import load_lora
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.verbs.compress import compress
from tests.conftest import FIXTURES
from tests.planting import KINDS, Product, plant, random_products, write_lora

FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors", "fidelity.json", "report.html"]


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def dense_error(lora: Path, compact: Path) -> float:
    """‖ΔW − ΔŴ‖ / ‖ΔW‖ from the two directories, every ΔW formed in float64."""
    source, form = load_lora(lora), load_compact(compact).form
    assert set(source.modules) == set(form.modules)
    lost = energy = 0.0
    for name, module in source.modules.items():
        matrix = module.scaling * (module.b.double() @ module.a.double())
        kept = form.delta(name)
        lost += float((matrix - kept.b.double() @ kept.a.double()).square().sum())
        energy += float(matrix.square().sum())
    return (lost / energy) ** 0.5


@pytest.mark.parametrize(
    ("transform", "budget"),
    [
        *((transform, 0.25) for transform in ("none", "ke", "ss", "gt", "auto")),
        *(pytest.param("auto", budget, marks=pytest.mark.slow) for budget in (0.4459, 0.125)),
    ],
)
def test_the_real_adapter(real_adapter: Path, tmp_path: Path, transform: str, budget: float) -> None:
    out = tmp_path / "out"
    record = compress(real_adapter, out, Recipe(transform=transform, budget=budget), report_html=False)
    error = record["weight"]["relative_error"]
    assert error == pytest.approx(dense_error(real_adapter, out), abs=1e-4)
    assert record["compact"]["parameter_ratio"] <= budget
    uniform = record["baselines"]["svd_uniform"]
    adaptive = record["baselines"]["svd_adaptive"]
    assert uniform["parameter_ratio"] <= record["compact"]["parameter_ratio"] + 1e-12
    if transform in ("none", "ke", "auto"):
        assert error <= uniform["unbiased_error"]
    if transform in ("none", "auto"):
        assert error <= adaptive["unbiased_error"] * 1.001
    gain = record["weight"]["gain"]
    assert sum(record["weight"]["components"].values()) == pytest.approx(gain, abs=1e-9) and 0.97 < gain < 1.003


def test_the_default_job_writes_exactly_its_files(real_adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    record = compress(real_adapter, out)
    assert names(out) == FILES
    assert json.loads((out / "fidelity.json").read_text()) == record
    assert record["source"]["sha256"] == hashlib.sha256((real_adapter / FILES[2]).read_bytes()).hexdigest()
    assert record["source"]["bytes"] == (real_adapter / FILES[2]).stat().st_size
    assert record["compact"]["bytes"] == (out / FILES[2]).stat().st_size
    assert record["source"]["parameters"] == 4_884_480
    assert record["weight"]["relative_error"] <= 0.1
    assert record["compact"]["byte_ratio"] <= 0.25
    assert record["compact"]["expanded_rank"] <= 16
    assert record["aim"] == {"asked": {"max_error": 0.1}, "path": [], "proofs": []}
    assert record["compact"]["dtype"] == record["source"]["dtype"] == "bfloat16"
    form = load_compact(out).form
    # A is stored against its random initialisation: fewer numbers than the form has.
    assert record["compact"]["parameters"] == load_compact(out).parameters
    assert record["compact"]["parameters"] < sum(tensor.numel() for tensor in form.tensors())
    card = (out / "README.md").read_text()
    assert record["source"]["sha256"] in card
    assert "--max-error 0.1" in card


def test_fidelity_follows_the_schema(real_adapter: Path, tmp_path: Path) -> None:
    record = compress(real_adapter, tmp_path / "out", Recipe(transform="none", budget=0.25), report_html=False)
    assert names(tmp_path / "out") == [name for name in FILES if name != "report.html"]
    assert record["schema_version"] == 1
    expected: dict[str, set[str]] = {
        "source": {"path", "sha256", "bytes", "parameters", "modules", "ranks", "dtype"},
        "compact": {
            "transform", "ranks", "shared_size", "bytes", "parameters", "parameter_ratio", "byte_ratio",
            "expanded_rank", "unique_tensors",
        },
        "weight": {"relative_error", "energy_kept", "cosine", "components", "modules"},
        "baselines": {"svd_uniform", "svd_adaptive"},
        "seconds": {"read", "fit", "write", "total"},
    }  # fmt: skip
    for part, fields in expected.items():
        assert fields <= set(record[part]), part
    assert record["functional"] is None
    assert set(record["weight"]["modules"][0]) == {"name", "relative_error", "energy", "local_rank"}
    total = sum(m["relative_error"] ** 2 * m["energy"] for m in record["weight"]["modules"])
    energy = sum(m["energy"] for m in record["weight"]["modules"])
    assert (total / energy) ** 0.5 == pytest.approx(record["weight"]["relative_error"], rel=1e-9)


@pytest.mark.parametrize("transform", ["ke", "ss", "none"])
def test_the_same_seed_writes_the_same_bytes(tmp_path: Path, transform: str) -> None:
    lora = write_lora(tmp_path / "lora", random_products())
    recipe = Recipe(transform=transform, budget=0.7, seed=5)
    for out in ("a", "b"):
        compress(lora, tmp_path / out, recipe)
    for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    first, second = (json.loads((tmp_path / out / "fidelity.json").read_text()) for out in ("a", "b"))
    assert first.pop("seconds") is not None
    assert second.pop("seconds") is not None
    assert first == second


@pytest.mark.parametrize("name", ["ke", "ss", "gt"])
def test_planted_directories_come_back(tmp_path: Path, name: str) -> None:
    from bslora_convert.bslora.transforms import Gate, Kronecker, Slice

    transform = {"ke": Kronecker(16), "ss": Slice(128, 128), "gt": Gate(32)}[name]
    form = plant(transform, (2, 4, 8))
    lora = write_lora(tmp_path / "lora", {module: form.delta(module) for module in form.modules}, alpha=28)
    size = None if name == "ss" else max(transform.pair_sizes)
    recipe = Recipe(transform=name, ranks=(2, 4, 8), shared_size=size, dtype="float32")
    record = compress(lora, tmp_path / "out", recipe, report_html=False)
    assert record["weight"]["relative_error"] < 1e-4
    assert dense_error(lora, tmp_path / "out") < 1e-4


def test_gate_by_hand_is_truncated_svd_of_rank_plus_two(real_adapter: Path, tmp_path: Path) -> None:
    errors = [
        compress(
            real_adapter,
            tmp_path / transform,
            Recipe(transform=transform, ranks=ranks, dtype="float32"),
            report_html=False,
        )["weight"]
        for transform, ranks in (("gt", (4, 1, 1)), ("none", (6, 0, 0)))
    ]
    assert errors[0]["relative_error"] == pytest.approx(errors[1]["relative_error"], abs=1e-6)


@pytest.mark.slow
def test_max_error_holds_for_what_was_written(real_adapter: Path, tmp_path: Path) -> None:
    recipe = Recipe(transform="none", max_error=0.3)
    record = compress(real_adapter, tmp_path / "out", recipe, report_html=False)
    assert 0.97 * 0.3 <= record["weight"]["relative_error"] <= 0.3
    assert record["compact"]["byte_ratio"] < 0.095


def test_an_error_finer_than_the_dtype_is_said_and_nothing_written(tmp_path: Path) -> None:
    with pytest.raises(ThresholdMissed, match="--dtype float32") as caught:
        compress(FIXTURES / "tiny" / "gsm8k", tmp_path / "out", Recipe(transform="none", max_error=1e-5))
    assert caught.value.exit_code == 1
    assert names(tmp_path) == []


def test_the_whole_budget_without_sharing_is_the_source(real_adapter: Path, tmp_path: Path) -> None:
    record = compress(
        real_adapter, tmp_path / "out", Recipe(transform="none", budget=1.0, dtype="float32"), report_html=False
    )
    assert record["weight"]["relative_error"] < 1e-6
    assert record["weight"]["cosine"] == pytest.approx(1.0)


def test_zero_deltas_and_odd_ranks(tmp_path: Path) -> None:
    products: dict[str, Product] = dict(random_products(rank=3))
    zero = products["model.layers.0.mlp.up_proj"].held
    products["model.layers.0.mlp.up_proj"] = Product(type(zero)(torch.zeros_like(zero.b), zero.a))
    lora = write_lora(tmp_path / "lora", products)
    for transform in ("ke", "ss", "gt", "none"):
        record = compress(
            lora,
            tmp_path / transform,
            Recipe(transform=transform, ranks=(1, *((1, 1) if transform != "none" else (0, 0)))),
            report_html=False,
        )
        assert dense_error(lora, tmp_path / transform) == pytest.approx(record["weight"]["relative_error"], abs=1e-4)
    everything_zero = {n: Product(type(zero)(torch.zeros_like(p.held.b), p.held.a)) for n, p in products.items()}
    lora = write_lora(tmp_path / "zero", everything_zero)
    for transform in ("ke", "none"):
        record = compress(lora, tmp_path / f"zero-{transform}", Recipe(transform=transform), report_html=False)
        assert record["weight"]["relative_error"] == 0.0


def test_passengers_travel_along(tmp_path: Path) -> None:
    head = torch.randn(4, 64)
    lora = write_lora(
        tmp_path / "lora",
        random_products(),
        extra={"base_model.model.classifier.weight": head},
        modules_to_save=["classifier"],
    )
    (lora / "tokenizer.json").write_text("{}")
    (lora / "optimizer.pt").write_text("stays behind")
    record = compress(lora, tmp_path / "out", Recipe(transform="ke", budget=0.7))
    assert names(tmp_path / "out") == sorted([*FILES, "tokenizer.json"])
    compact = load_compact(tmp_path / "out")
    assert torch.equal(compact.carried["classifier.weight"], head)
    assert compact.config["modules_to_save"] == ["classifier"]
    assert record["source"]["parameters"] == sum(8 * (o + i) for o, i in KINDS.values()) * 2


@pytest.mark.parametrize("transform", ["ke", "ss"])
def test_an_error_that_nobody_asked_for_gives_way_to_the_slot(tmp_path: Path, transform: str) -> None:
    """Random updates of rank 8 have flat spectra: shared parts in eight ranks can't come near them."""
    lora = write_lora(tmp_path / "lora", random_products())
    record = compress(lora, tmp_path / "out", Recipe(transform=transform), report_html=False)
    error = record["weight"]["relative_error"]
    assert 0.1 < error <= record["recipe"]["max_error"] < error + 0.01
    assert record["compact"]["expanded_rank"] <= 8
    assert record["compact"]["ranks"]["intra"] >= 1
    assert any("ATTENTION" in note and "can't be reached with --transform" in note for note in record["notes"])
    with pytest.raises(ThresholdMissed, match="give --transform auto"):
        compress(lora, tmp_path / "asked", Recipe(transform=transform, max_error=0.1), report_html=False)
    assert compress(lora, tmp_path / "auto", report_html=False)["weight"]["relative_error"] <= 0.1


def test_ranks_without_a_transform_take_the_best_one(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products())
    found = compress(lora, tmp_path / "auto", Recipe(ranks=(2, 1, 1)), report_html=False)
    errors = {
        name: compress(lora, tmp_path / name, Recipe(transform=name, ranks=(2, 1, 1)), report_html=False)["weight"]
        for name in ("ke", "ss")
    }
    assert found["weight"]["relative_error"] == min(weight["relative_error"] for weight in errors.values())
    assert (
        compress(lora, tmp_path / "none", Recipe(ranks=(2, 0, 0)), report_html=False)["compact"]["transform"] == "none"
    )


def test_bad_places_are_refused_before_any_work(real_adapter: Path, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products())
    before = (lora / "adapter_model.safetensors").read_bytes()
    for out in (lora, tmp_path):
        with pytest.raises(InputError, match="replace the source"):
            compress(lora, out, overwrite=True)
    with pytest.raises(InputError, match="inside of the source"):
        compress(lora, lora / "in")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("x")
    with pytest.raises(OutputError, match="not empty"):
        compress(lora, full)
    with pytest.raises(OutputError, match="mine"):
        compress(lora, full, overwrite=True)
    with pytest.raises(RecipeError, match="can't hold"):
        compress(lora, tmp_path / "out", Recipe(transform="ke", budget=0.001))
    assert (lora / "adapter_model.safetensors").read_bytes() == before
    assert (names(tmp_path), names(full)) == (["full", "lora"], ["mine"])


@pytest.mark.parametrize(
    ("end", "step"),
    [
        (signal.SIGKILL, "writing"),
        (signal.SIGTERM, "starting the shared parts"),
        (signal.SIGINT, "reading"),
        pytest.param(signal.SIGKILL, "reading", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "starting the shared parts", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "writing", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "writing", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_leaves_no_output(real_adapter: Path, tmp_path: Path, end: signal.Signals, step: str) -> None:
    out = tmp_path / "out"
    size = ["--transform", "ke", "--budget", "0.25"]
    command = [sys.executable, "-m", "bslora_convert", "compress", str(real_adapter), str(out), *size, "--verbose"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment(), text=True, bufsize=1
    )
    assert process.stderr is not None
    assert any(step in line for line in process.stderr)
    process.send_signal(end)
    process.communicate(timeout=60)
    code = process.returncode
    if code == 0:  # the run was faster than the signal: then the output is whole
        assert names(out) == FILES
        return
    assert not out.exists()
    assert code == (-signal.SIGKILL if end == signal.SIGKILL else 130)
    if end != signal.SIGKILL:
        assert names(tmp_path) == []
    record = compress(real_adapter, out, Recipe(transform="none", budget=0.25), report_html=False)
    assert record["compact"]["parameter_ratio"] <= 0.25
    assert names(tmp_path) == ["out"]


def environment() -> dict[str, Any]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
