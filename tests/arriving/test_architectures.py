"""Adapters that PEFT made of many architectures with `all-linear` alone: the compact form and its expansion do the same."""

import json
from pathlib import Path

import pytest

from bslora_convert import Recipe, compress, expand
from bslora_convert.report.verdict import sentences
from tests.arriving.making import FAMILIES, adapted, answers, apart, base, loaded
from tests.planting import random_products, write_lora

EXACT = Recipe(transform="none", budget=1.0, dtype="float32")
OTHERWISE = {"scored", "deepseek_v3", "gpt_oss", "qwen3_moe", "deepseek_v2", "glm4_moe"}  # have tests of their own


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - OTHERWISE))
def test_the_same_on_the_model(tmp_path: Path, family: str) -> None:
    lora = adapted(tmp_path / "lora", family)
    wanted = answers(loaded(lora, family))
    assert apart(answers(base(family)), wanted) > 0.01
    compress(lora, tmp_path / "compact", EXACT, report_html=False)
    assert apart(answers(loaded(tmp_path / "compact", family)), wanted) < 1e-5
    expand(tmp_path / "compact", tmp_path / "expanded")
    assert apart(answers(loaded(tmp_path / "expanded", family)), wanted) < 1e-5


def test_a_tied_head_keeps_the_copy_that_peft_saved(tmp_path: Path) -> None:
    lora = adapted(tmp_path / "lora", "gemma2", target_modules=["q_proj", "lm_head"])
    record = compress(lora, tmp_path / "compact", EXACT, report_html=False)
    assert any(note.startswith("lm_head.base_layer.weight are whole weights") for note in record["notes"])
    both = [answers(loaded(place, "gemma2")) for place in (tmp_path / "compact", lora)]
    assert apart(*both) < 1e-5


def test_a_configuration_of_many_experts_is_small(tmp_path: Path) -> None:
    kinds = {f"mlp.experts.{number}.{name}": (16, 32) for number in range(64) for name in ("gate_proj", "up_proj")}
    lora = write_lora(tmp_path / "lora", random_products(layers=3, rank=2, kinds=kinds))
    record = compress(lora, tmp_path / "out", Recipe(transform="none", bytes=0.3), report_html=False)
    config = (tmp_path / "out" / "adapter_config.json").stat().st_size
    assert len(json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules"]) < 20
    assert config < 0.1 * record["compact"]["bytes"]
    assert record["compact"]["config_bytes"] == config
    share = (config + record["compact"]["bytes"]) / record["source"]["bytes"]
    told = f"{share:.1%} with its configuration" in " ".join(sentences(record))
    assert told == (config > 0.02 * record["compact"]["bytes"])
