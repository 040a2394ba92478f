"""Every field of PEFT's LoRA configuration is treated on purpose, and what is carried arrives."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModel, LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import bslora_convert.peft
from bslora_convert import Recipe, compress, expand
from bslora_convert.lora.fields import CARRIED, FIELDS, FOREIGN_FIELDS, SELECTS, TREATMENTS
from tests.planting import random_products, write_lora

EXACT = Recipe(transform="none", budget=1.0, dtype="float32")


def test_every_field_of_peft_has_a_treatment() -> None:
    """Fails when PEFT adds a field: say in lora/fields.py how it is treated."""
    assert set(FIELDS) == {field.name for field in dataclasses.fields(LoraConfig)}
    assert not set(FIELDS) & set(FOREIGN_FIELDS)
    for field in (FIELDS | FOREIGN_FIELDS).values():
        assert field.how in TREATMENTS
        assert field.why


def test_the_tuner_knows_what_is_written_for_it() -> None:
    own = {field.name for field in dataclasses.fields(bslora_convert.peft.BsloraConfig)}
    assert set(CARRIED) | set(SELECTS) <= own


CARRIED_VALUES: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "auto_mapping": {"base_model_class": "A", "parent_library": "b.c"},
    "base_model_name_or_path": "org/base",
    "revision": "v2",
    "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "ensure_weight_tying": True,
    "exclude_modules": ["other"],
    "layers_to_transform": [0, 1],
    "layers_pattern": "layers",
}


@pytest.mark.parametrize("field", [*CARRIED, *SELECTS])
def test_what_is_carried_is_in_both_configurations(tmp_path: Path, field: str) -> None:
    if field == "target_modules":
        settings: dict[str, Any] = {
            field: ["k_proj", "o_proj", "q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
        }
        settings[field].sort()
    else:
        settings = {field: CARRIED_VALUES[field]}
    if field == "layers_pattern":
        settings["layers_to_transform"] = [0, 1]
    compress(
        write_lora(tmp_path / "lora", random_products(), **settings), tmp_path / "compact", EXACT, report_html=False
    )
    expand(tmp_path / "compact", tmp_path / "expanded")
    for directory in ("compact", "expanded"):
        config = json.loads((tmp_path / directory / "adapter_config.json").read_text())
        assert config[field] == settings[field]


@pytest.mark.filterwarnings("ignore")
def test_auto_peft_model_loads_what_has_no_task_type(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    )
    base.save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False))
    model.save_pretrained(tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["auto_mapping"]
    compress(tmp_path / "lora", tmp_path / "compact", EXACT, report_html=False)
    expand(tmp_path / "compact", tmp_path / "expanded")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        for directory in ("lora", "compact", "expanded"):
            loaded = AutoPeftModel.from_pretrained(str(tmp_path / directory)).eval()
            assert torch.allclose(loaded(input_ids=ids).logits, expected, atol=1e-5)
