"""What `expand --for` writes is read by each engine's own arithmetic to the same update, or there is a reason why not."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from bslora_convert import Recipe, batch, compress, expand, expand_library, load_compact, load_lora
from bslora_convert.bslora.form import BsloraForm, Module
from bslora_convert.bslora.storage import save_compact
from bslora_convert.cli import main
from bslora_convert.errors import RecipeError, Refused
from bslora_convert.modules.factors import Factors
from bslora_convert.serving.engines import ENGINES, SGMV_RANKS
from tests.conftest import FIXTURES
from tests.planting import random_products, write_lora

BASE = FIXTURES / "tiny" / "base"
LORA = [name for name, engine in ENGINES.items() if engine.format == "lora"]
PREFIX = "base_model.model."


def factors(rank: int, out: int = 64, width: int = 48, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(out, rank, generator=generator), torch.randn(rank, width, generator=generator))


def compact(place: Path, ranks: Mapping[str, int], carried: Mapping[str, Tensor] | None = None, **kinds: str) -> Path:
    """A compact adapter without sharing, its modules of these ranks."""
    modules = {
        name: Module((64, 48), factors(rank, seed=seed), {}, kinds.get(name.replace(".", "_"), "linear"))
        for seed, (name, rank) in enumerate(ranks.items())
    }
    place.mkdir(parents=True)
    config = {"base_model_name_or_path": "a-base", "task_type": "CAUSAL_LM"}
    save_compact(BsloraForm(None, modules), place, config, carried or {})
    return place


def layered(*missing: str) -> dict[str, int]:
    """Ranks 1 to 12 of three kinds in three layers, without some modules."""
    names = [f"model.layers.{n}.self_attn.{kind}" for n in range(3) for kind in ("q_proj", "k_proj", "o_proj")]
    return {name: 1 + (5 * place) % 12 for place, name in enumerate(names) if name not in missing}


def read(place: Path) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """The configuration, and (A, B) by module in the order of their names."""
    tensors = load_file(place / "adapter_model.safetensors")
    names = sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    pairs = {n.removeprefix(PREFIX): (tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"]) for n in names}
    return json.loads((place / "adapter_config.json").read_text()), pairs


def by_configured_rank(config: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """vLLM and SGLang: one scaling, alpha / r."""
    return {name: b @ a * (config["lora_alpha"] / config["r"]) for name, (a, b) in pairs.items()}


def by_own_rank(config: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """TensorRT-LLM: alpha / the tensor's own rank."""
    return {name: b @ a * (config["lora_alpha"] / a.shape[0]) for name, (a, b) in pairs.items()}


def by_filled_rank(config: dict[str, Any], pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """LoRAX and TGI: kind by kind, each stacked over the layers; `r` becomes the filled up rank after the first kind."""
    rank, found = config["r"], {}
    layers = {name.split(".")[2] for name in pairs}
    for kind in dict.fromkeys(name.split(".", 3)[3] for name in pairs):
        names = [f"model.layers.{layer}.{kind}" for layer in sorted(layers)]
        if any(name not in pairs for name in names):
            continue  # dropped without a word
        torch.stack([pairs[name][0] for name in names])
        found |= {name: pairs[name][1] @ pairs[name][0] * (config["lora_alpha"] / rank) for name in names}
        rank = next(step for step in SGMV_RANKS if step >= pairs[names[0]][0].shape[0])
    return found


READERS: dict[str, Callable[..., dict[str, Tensor]]] = {
    "vllm": by_configured_rank, "sglang": by_configured_rank, "lorax": by_filled_rank, "tgi": by_filled_rank,
    "trtllm": by_own_rank,
}  # fmt: skip


@pytest.mark.parametrize("engine", LORA)
def test_each_engine_reads_the_update_of_the_form(tmp_path: Path, engine: str) -> None:
    source = compact(tmp_path / "c", layered("model.layers.1.self_attn.k_proj"))
    result = expand(source, tmp_path / "out", engine=engine)
    config, pairs = read(tmp_path / "out")
    form, updates = load_compact(source).form, READERS[engine](config, pairs)
    for name in form.modules:
        delta = form.delta(name)
        torch.testing.assert_close(updates[name], delta.b @ delta.a, rtol=1e-5, atol=1e-5)
    for name in set(updates) - set(form.modules):
        assert not updates[name].any(), name
    ranks = {a.shape[0] for a, _ in pairs.values()}
    rules = ENGINES[engine]
    assert config["r"] == config["lora_alpha"] == max(ranks) == result["ranks"]["max"]
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj"]
    assert (len(ranks) == 1) is rules.one_rank
    assert (config["rank_pattern"] == {}) is rules.one_rank
    assert not rules.filled or ranks <= set(rules.filled)
    assert len(pairs) == (9 if rules.every_layer else 8)
    assert result["engine"] == engine
    assert result["relative_error"] < 1e-6


def test_the_plain_file_is_not_what_these_engines_read(tmp_path: Path) -> None:
    """Otherwise `--for` would be for nothing."""
    source = compact(tmp_path / "c", layered("model.layers.1.self_attn.k_proj"))
    expand(source, tmp_path / "out")
    config, pairs = read(tmp_path / "out")
    form = load_compact(source).form
    wrong = by_own_rank(config, pairs)
    deltas = {name: form.delta(name) for name in form.modules}
    assert any(not torch.allclose(wrong[name], d.b @ d.a, rtol=0.01) for name, d in deltas.items())
    with pytest.raises(RuntimeError, match="stack"):
        by_filled_rank(config, pairs)
    expand(source, tmp_path / "uniform", rank="uniform")
    config, pairs = read(tmp_path / "uniform")
    assert by_filled_rank(config, pairs).keys() < deltas.keys()  # a kind that a layer lacks is dropped
    late = by_filled_rank(config, pairs)["model.layers.0.self_attn.q_proj"]
    right = deltas["model.layers.0.self_attn.q_proj"]
    assert torch.allclose(late, right.b @ right.a * 12 / 16, rtol=1e-4)  # 12 is filled up to 16


def test_layers_are_filled_as_far_as_the_base_has_them(tmp_path: Path) -> None:
    source = compact(tmp_path / "c", {"model.layers.0.self_attn.q_proj": 3})
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"num_hidden_layers": 4}')
    expand(source, tmp_path / "out", engine="lorax", base_model=str(tmp_path / "base"))
    assert list(read(tmp_path / "out")[1]) == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(4)]


@pytest.mark.parametrize("engine", ["vllm", "lorax"])
def test_real_peft_reads_it_as_well(tmp_path: Path, engine: str) -> None:
    compress(
        FIXTURES / "tiny" / "gsm8k",
        tmp_path / "c",
        Recipe(transform="ke", budget=0.5, dtype="float32", shared_size=32),
        report_html=False,
    )
    ids = torch.arange(2, 34)[None]
    found = []
    for name, options in (("plain", {}), ("served", {"engine": engine})):
        expand(tmp_path / "c", tmp_path / name, **options)  # type: ignore[arg-type]
        base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
        with torch.no_grad():
            found.append(PeftModel.from_pretrained(base, str(tmp_path / name))(input_ids=ids).logits)
    assert torch.allclose(*found, atol=2e-4)


TABLE, HEAD = "model.embed_tokens", {"lm_head.weight": torch.ones(4, 4)}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an embedding": ("sglang", {"ranks": {TABLE: 2}, "model_embed_tokens": "embedding"}, "is an embedding"),
    "a tied one": ("vllm", {"ranks": {TABLE: 2}, "model_embed_tokens": "tied_embedding"}, "tied to it"),
    "a carried head": ("vllm", {"ranks": {"a.0.q_proj": 2}, "carried": HEAD}, "carries lm_head.weight"),
    "experts": ("lorax", {"ranks": {"model.layers.0.mlp.experts.0.up_proj": 2}}, "mixture of experts"),
    "unknown modules": ("trtllm", {"ranks": {"model.layers.0.attn.c_attn": 2}}, "c_attn is none of the modules"),
    "a large rank": ("vllm", {"ranks": {"model.layers.0.self_attn.q_proj": 513}}, "give --rank 512"),
    "a large rank to fill": ("tgi", {"ranks": {"model.layers.0.self_attn.q_proj": 513}}, "give --rank 512"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_served_says_why(tmp_path: Path, case: str) -> None:
    engine, made, words = REFUSED[case]
    source = compact(tmp_path / "c", **made)
    with pytest.raises(Refused, match=words):
        expand(source, tmp_path / "out", engine=engine)
    done = CliRunner().invoke(main, ["expand", str(source), str(tmp_path / "out"), "--for", engine])
    assert done.exit_code == 3
    assert ENGINES[engine].title in done.stderr
    assert not (tmp_path / "out").exists()


def test_layers_of_other_sizes_are_not_filled(tmp_path: Path) -> None:
    modules = {
        "layers.0.q": Module((8, 4), factors(1, 8, 4)), "layers.1.q": Module((6, 4), factors(1, 6, 4)),
    }  # fmt: skip
    (tmp_path / "c").mkdir()
    save_compact(BsloraForm(None, modules), tmp_path / "c", {}, {})
    with pytest.raises(Refused, match="another size"):
        expand(tmp_path / "c", tmp_path / "out", engine="tgi")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "vllm", "format": "gguf"}, "reads format lora, not gguf"),
        ({"engine": "ollama"}, "engine is 'ollama'"),
        ({"format": "onnx"}, "format is 'onnx'"),
        ({"dtype": "q8_0"}, "only format gguf"),
        ({"dtype": "q4_0"}, "dtype is 'q4_0'"),
        ({"format": "gguf"}, "needs base_model"),
        ({"format": "official", "rank": 3}, "only a LoRA"),
        ({"rank": True}, "rank is True"),
    ],
)
def test_options_that_exclude_each_other_are_named(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        expand(tmp_path, tmp_path / "out", **options)


def test_what_a_server_needs_is_said(tmp_path: Path) -> None:
    compress(
        write_lora(tmp_path / "lora", random_products(rank=9)), tmp_path / "c", Recipe(transform="none", budget=0.9)
    )
    done = CliRunner().invoke(main, ["expand", str(tmp_path / "c"), str(tmp_path / "out"), "--for", "vllm"])
    assert done.exit_code == 0, done.stderr
    record = json.loads((tmp_path / "out" / "expansion.json").read_text())
    own = json.loads((tmp_path / "c" / "fidelity.json").read_text())
    width = own["source"]["width"]
    kinds = sorted({name.rpartition(".")[2] for name in load_lora(tmp_path / "lora").modules})
    assert record["served"] == {"max_lora_rank": 16, "slot_bytes": 2 * 16 * width, "target_modules": kinds}
    assert record["original"]["sha256"] == own["source"]["sha256"]
    assert record["original"]["relative_error"] == pytest.approx(own["weight"]["relative_error"], abs=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (done.stdout, card):
        assert f"{2 * 16 * width:,}" in text
    assert "--max-lora-rank 16" in card
    assert card.startswith("---\nlibrary_name: peft\n")
    assert "README.md" in record["files"]


def test_the_error_against_the_original_is_no_less_than_it_is(tmp_path: Path) -> None:
    """Also after another truncation."""
    products = random_products(rank=6)
    compress(
        write_lora(tmp_path / "lora", products), tmp_path / "c", Recipe(transform="none", budget=0.6), report_html=False
    )
    record = expand(tmp_path / "c", tmp_path / "out", rank=2)
    _, pairs = read(tmp_path / "out")
    lost = energy = 0.0
    for name, product in products.items():
        whole = product.held.b.double() @ product.held.a.double()
        a, b = pairs[name]
        lost, energy = (
            lost + float((whole - b.double() @ a.double()).square().sum()),
            energy + float(whole.square().sum()),
        )
    assert (lost / energy) ** 0.5 <= record["original"]["relative_error"] < 1.2


def test_files_that_an_engine_stumbles_over_stay_behind(tmp_path: Path) -> None:
    source = compact(tmp_path / "c", layered())
    (source / "added_tokens.json").write_text('{"<x>": 1}')
    expand(source, tmp_path / "vllm", engine="vllm")
    expand(source, tmp_path / "sglang", engine="sglang")
    assert (tmp_path / "vllm" / "added_tokens.json").is_file()
    assert not (tmp_path / "sglang" / "added_tokens.json").exists()


def test_a_library_for_an_engine(tmp_path: Path) -> None:
    for seed, rank in enumerate((4, 10)):
        write_lora(tmp_path / "in" / f"t{rank}", random_products(layers=2, rank=rank, seed=seed))
    batch(tmp_path / "in", tmp_path / "library", Recipe(transform="none", budget=0.8), workers=0)
    result = expand_library(tmp_path / "library", tmp_path / "served", engine="lorax")
    assert [row["ranks"]["max"] for row in result["rows"]] == [16, 8]
    assert result["served"]["max_lora_rank"] == 16
    shown = CliRunner().invoke(main, ["expand", str(tmp_path / "library"), str(tmp_path / "again"), "--for", "vllm"])
    assert shown.exit_code == 0
    assert "(--max-lora-rank)" in shown.stdout
    with pytest.raises(RecipeError, match="engine is 'x'"):
        expand_library(tmp_path / "library", tmp_path / "never", engine="x")


def test_the_readme_of_the_package_names_every_engine() -> None:
    page = (FIXTURES.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    assert [name for name in ENGINES if f"--for {name}" not in page] == []
