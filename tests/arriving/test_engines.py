"""What engines do with parts that are no plain layers: taken, left out or refused, each with a word. Rules of vLLM 0.32.0."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from bslora_convert import Recipe, compress, expand, load_lora
from bslora_convert.cli import main
from bslora_convert.errors import Refused
from tests.arriving.making import adapted, answers, apart, loaded
from tests.planting import random_products, write_lora

EXACT = Recipe(transform="none", budget=1.0, dtype="float32")
WEIGHTS = "adapter_model.safetensors"


def served(
    lora: Path, out: Path, engine: str = "vllm"
) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """The record, configuration and tensors of what an engine gets."""
    compress(lora, out / "compact", EXACT, report_html=False)
    record = expand(out / "compact", out / engine, engine=engine)
    weights = "adapters.safetensors" if engine == "mlx" else WEIGHTS
    return (
        record.to_dict(),
        json.loads((out / engine / "adapter_config.json").read_text()),
        load_file(out / engine / weights),
    )


def urgent(record: dict[str, Any]) -> list[str]:
    return [note.removeprefix("ATTENTION: ") for note in record["notes"] if note.startswith("ATTENTION")]


def test_a_score_head_is_taken_and_any_other_refused(tmp_path: Path) -> None:
    options = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"], "modules_to_save": ["score"]}
    lora = adapted(tmp_path / "lora", "scored", **options)
    record, config, tensors = served(lora, tmp_path)
    assert config["modules_to_save"] == ["score"] and config["target_modules"] == ["q_proj"]
    assert torch.equal(
        tensors["base_model.model.score.weight"], load_file(lora / WEIGHTS)["base_model.model.score.weight"]
    )
    assert apart(answers(loaded(tmp_path / "vllm", "scored")), answers(loaded(lora, "scored"))) < 1e-5
    assert urgent(record) == []
    extra = {"base_model.model.value_head.weight": torch.ones(1, 64)}
    compress(
        write_lora(tmp_path / "other", random_products(layers=1), extra=extra), tmp_path / "c", EXACT, report_html=False
    )
    with pytest.raises(Refused, match=r"it carries value_head\.weight whole"):
        expand(tmp_path / "c", tmp_path / "never", engine="vllm")


def test_copies_of_the_base_are_left_out(tmp_path: Path) -> None:
    extra = {"base_model.model.model.embed_tokens.base_layer.weight": torch.ones(9, 64)}
    lora = write_lora(tmp_path / "lora", random_products(layers=1), extra=extra)
    for engine in ("vllm", "sglang"):
        record, _, tensors = served(lora, tmp_path / engine, engine)
        assert not any("base_layer" in key for key in tensors)
        assert urgent(record) == ["left out, for it is the base's own: model.embed_tokens.base_layer.weight"]


def test_what_latent_attention_ignores_is_said(tmp_path: Path) -> None:
    kinds = {"self_attn.q_b_proj": (64, 16), "self_attn.kv_b_proj": (64, 8), "self_attn.o_proj": (64, 32)}
    record, _, _ = served(write_lora(tmp_path / "lora", random_products(rank=4, kinds=kinds)), tmp_path)
    (said,) = urgent(record)
    assert said.startswith("vLLM loads 2 updates of kv_b_proj and never applies them")


def test_a_vision_tower_needs_its_option(tmp_path: Path) -> None:
    products = random_products(layers=1)
    other = random_products(layers=1, seed=1).items()
    tower = {name.replace("model.layers", "model.vision_tower.layers"): product for name, product in other}
    record, _, _ = served(write_lora(tmp_path / "lora", products | tower), tmp_path)
    (said,) = urgent(record)
    assert "drops 7 updates of model.vision_tower" in said and "--enable-tower-connector-lora" in said
    done = CliRunner().invoke(main, ["expand", str(tmp_path / "compact"), str(tmp_path / "again"), "--for", "vllm"])
    assert "--max-lora-rank 8 --enable-tower-connector-lora" in done.output.replace("\n", " ")


def test_fused_experts_stand_as_vllm_reads_them(tmp_path: Path) -> None:
    lora = adapted(tmp_path / "lora", "qwen3_moe")
    record, config, tensors = served(lora, tmp_path)
    assert "--enable-mixed-moe-lora-format" in urgent(record)[0]
    assert not {"gate_up_proj", "down_proj"} & set(config["target_modules"])
    before, after = load_lora(lora), load_lora(tmp_path / "vllm")
    for name, module in before.modules.items():
        first, second = module.factors(), after.modules[name].factors()
        torch.testing.assert_close(second.b @ second.a, first.b @ first.a, rtol=1e-4, atol=1e-5)
    experts = {key for key in tensors if ".experts." in key}
    assert {key.split(".experts.")[1] for key in experts} == {
        "base_layer.lora_A.weight", "base_layer.lora_B.weight", "lora_A.weight", "lora_B.weight",
    }  # fmt: skip
    half = adapted(
        tmp_path / "half", "qwen3_moe", target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"]
    )
    compress(half, tmp_path / "c", EXACT, report_html=False)
    with pytest.raises(Refused, match="one parameter alone is adapted"):
        expand(tmp_path / "c", tmp_path / "never", engine="vllm")


def test_mlx_calls_the_language_model_its_own_way(tmp_path: Path) -> None:
    products = {name.replace("model.", "model.language_model."): p for name, p in random_products(layers=1).items()}
    record, config, tensors = served(write_lora(tmp_path / "lora", products), tmp_path, "mlx")
    assert all(key.startswith("language_model.model.layers.0.") for key in tensors)
    assert record["relative_error"] < 1e-6
    assert "self_attn.q_proj" in config["lora_parameters"]["keys"]
