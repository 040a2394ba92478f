"""What can't be converted faithfully is refused with exit code 3, naming the file, the field or tensor, and the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from bslora_convert.errors import Refused
from bslora_convert.lora import load_lora
from bslora_convert.lora.config import REFUSALS
from tests.planting import random_products, write_lora

FIELDS: list[tuple[str, Any]] = [
    ("use_dora", True),
    ("lora_bias", True),
    ("bias", "lora_only"),
    ("bias", "all"),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("corda_config", {"x": 1}),
    ("loftq_config", {"loftq_bits": 4}),
    ("use_qalora", True),
    ("use_bdlora", {"x": 1}),
    ("alora_invocation_tokens", [1, 2]),
    ("target_parameters", ["mlp.experts.gate_up_proj"]),
    ("layer_replication", [[0, 2], [1, 3]]),
    ("megatron_config", {"x": 1}),
    ("kasa_config", {"x": 1}),
    ("arrow_config", {"x": 1}),
]


def test_every_refusal_is_tried() -> None:
    assert {field for field, _ in FIELDS} == set(REFUSALS)


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_fields(tmp_path: Path, field: str, value: Any) -> None:
    write_lora(tmp_path / "lora", random_products(layers=1), **{field: value})
    with pytest.raises(Refused) as caught:
        load_lora(tmp_path / "lora")
    assert caught.value.exit_code == 3
    assert "adapter_config.json" in str(caught.value)
    assert f"{field} is " in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_dora", False), ("loftq_config", {}), ("init_lora_weights", True), ("init_lora_weights", "eva"), ("bias", "none"),
     ("lora_ga_config", {"x": 1}), ("megatron_core", "megatron.core"), ("corda_config", None)],
)  # fmt: skip
def test_harmless_values_are_not_refused(tmp_path: Path, field: str, value: Any) -> None:
    write_lora(tmp_path / "lora", random_products(layers=1), **{field: value})
    assert load_lora(tmp_path / "lora").modules


def test_an_unknown_setting_is_refused_only_where_it_is_set(tmp_path: Path) -> None:
    write_lora(tmp_path / "lora", random_products(layers=1), use_newlora=None, newlora_rank=0 * 1.0 or None)
    assert load_lora(tmp_path / "lora").modules
    write_lora(tmp_path / "lora", random_products(layers=1), use_newlora=True)
    with pytest.raises(Refused, match="use_newlora is True"):
        load_lora(tmp_path / "lora")


@pytest.mark.parametrize(
    "kind",
    [
        "ADALORA",
        "LOHA",
        "LOKR",
        "VERA",
        "PROMPT_TUNING",
        "IA3",
        "SHARELORA",
        "BSLORA",
        "BASELINESHARELORA",
        "TIEDLORA",
        7,
    ],
)
def test_other_peft_types(tmp_path: Path, kind: Any) -> None:
    write_lora(tmp_path / "lora", random_products(layers=1), peft_type=kind)
    with pytest.raises(Refused, match="peft_type"):
        load_lora(tmp_path / "lora")


@pytest.mark.parametrize(
    "key",
    [
        "lora_magnitude_vector",
        "lora_magnitude_vector.weight",
        "lora_B.bias",
        "lora_E",
        "lora_ranknum",
        "lora_diag",
        "lora_new.weight",
    ],
)
def test_foreign_tensors(tmp_path: Path, key: str) -> None:
    name = f"base_model.model.model.layers.0.self_attn.q_proj.{key}"
    write_lora(tmp_path / "lora", random_products(layers=1), extra={name: torch.ones(4)})
    with pytest.raises(Refused) as caught:
        load_lora(tmp_path / "lora")
    assert name in str(caught.value)
    assert "adapter_model.safetensors" in str(caught.value)


def test_convolutions(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(target_modules=["0"], r=2))
    model.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="convolution"):
        load_lora(tmp_path)


def test_real_dora(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2, use_dora=True))
    model.save_pretrained(tmp_path)
    with pytest.raises(Refused, match="DoRA"):
        load_lora(tmp_path)
    # Even where the configuration forgets to say so.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(Refused, match="lora_magnitude_vector"):
        load_lora(tmp_path)


def test_real_pissa(tmp_path: Path) -> None:
    options = LoraConfig(target_modules=["0"], r=2, init_lora_weights="pissa")
    get_peft_model(nn.Sequential(nn.Linear(8, 8)), options).save_pretrained(tmp_path)
    with pytest.raises(Refused, match="pissa"):
        load_lora(tmp_path)


def test_integer_factors(tmp_path: Path) -> None:
    write_lora(tmp_path / "lora", random_products(layers=1))
    path = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({key: tensor.to(torch.int8) for key, tensor in load_file(path).items()}, path)
    with pytest.raises(Refused, match="int8"):
        load_lora(tmp_path / "lora")
