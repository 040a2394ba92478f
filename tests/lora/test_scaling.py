"""Every rule of PEFT's scaling, against the delta that real PEFT computes from the same file."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bslora_convert.lora import load_lora

TARGETS = ["q_proj", "v_proj", "down_proj"]


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def saved(model: Any, directory: Path, **options: Any) -> PeftModel:
    """A PEFT model with random factors, saved and read back, since saving sorts the patterns and the first match wins."""
    adapted = get_peft_model(model, LoraConfig(**{"target_modules": TARGETS, "r": 4, "lora_alpha": 12, **options}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(directory)
    return PeftModel.from_pretrained(copy.deepcopy(adapted.unload()), str(directory))


def assert_same_deltas(adapted: PeftModel, path: Path, adapter: str = "default") -> None:
    read = load_lora(path).modules
    expected = {
        name.removeprefix("base_model.model."): layer.get_delta_weight(adapter)
        for name, layer in adapted.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert set(read) == set(expected)
    for name, delta in expected.items():
        factors = read[name].factors()
        mine = factors.b @ factors.a
        if mine.shape != delta.shape or read[name].kind == "embedding":
            mine = mine.T
        assert torch.allclose(mine, delta.float(), rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 1},
        {"lora_alpha": 32, "r": 3},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 5}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7, "v_proj": 3}, "use_rslora": True},
        {"rank_pattern": {r"layers\.[01]\.self_attn\..*": 2}},
        {"alpha_pattern": {"model.layers.1.mlp.down_proj": 9, "down_proj": 2}},
        {"alpha_pattern": {"proj": 99}},  # not preceded by a dot in any name: matches nothing
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q_proj|o_proj)"},
        {"layers_to_transform": [0, 2]},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.3},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_against_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_same_deltas(saved(llama(), tmp_path, **options), tmp_path)


def test_conv1d_with_fan_in_fan_out(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16))
    options = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    adapted = saved(model, tmp_path, **options)
    assert load_lora(tmp_path).modules["transformer.h.0.attn.c_attn"].shape == (96, 32)
    assert_same_deltas(adapted, tmp_path)


def test_embeddings(tmp_path: Path) -> None:
    adapted = saved(llama(), tmp_path, target_modules=["embed_tokens", "q_proj"])
    adapter = load_lora(tmp_path)
    assert adapter.modules["model.embed_tokens"].kind == "embedding"
    assert adapter.modules["model.embed_tokens"].shape == (32, 50)
    # PEFT stores the whole table beside its factors: carried along, never counted.
    assert "model.embed_tokens.base_layer.weight" in adapter.carried
    assert adapter.parameters == sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert_same_deltas(adapted, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_storage_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    adapted = saved(llama(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    adapter = load_lora(tmp_path)
    assert adapter.dtype == dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for name, module in adapter.modules.items():
        assert module.factors().b.dtype == compute
        delta = adapted.get_submodule(f"base_model.model.{name}").get_delta_weight("default")
        factors = module.factors()
        assert float((factors.b @ factors.a - delta).norm() / delta.norm()) < 0.01


def test_an_adapter_with_a_name_stands_in_a_folder(tmp_path: Path) -> None:
    adapted = get_peft_model(llama(), LoraConfig(target_modules=TARGETS), adapter_name="german")
    adapted.save_pretrained(tmp_path)
    adapter = load_lora(tmp_path)
    assert adapter.weights.parent.name == "german"
    assert any("german" in note for note in adapter.notes)
    assert len(adapter.modules) == 9


@pytest.mark.parametrize(
    "change",
    [
        lambda key: key.removeprefix("base_model.model."),
        lambda key: "base_model.model." + key,
        lambda key: "base_model.model.base_model.model." + key,
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: key.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        ),
    ],
)
def test_prefixes(tmp_path: Path, change: Any) -> None:
    adapted = saved(llama(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({change(key): tensor for key, tensor in load_file(path).items()}, path)
    assert_same_deltas(adapted, tmp_path)


def test_a_bin_file_holds_the_same(tmp_path: Path) -> None:
    adapted = saved(llama(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    path.unlink()
    assert_same_deltas(adapted, tmp_path)
    assert_same_deltas(adapted, tmp_path / "adapter_model.bin")


def test_the_tensors_win_over_the_configurations_rank(tmp_path: Path) -> None:
    adapted = saved(llama(), tmp_path, r=4, lora_alpha=12)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 16}))
    adapter = load_lora(tmp_path)
    assert {module.rank for module in adapter.modules.values()} == {4}
    assert any("16" in note and "taken as the truth" in note for note in adapter.notes)
    assert_same_deltas(adapted, tmp_path)


def test_modules_are_in_natural_order(tmp_path: Path) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)}) for _ in range(12)])

    saved(Deep(), tmp_path, target_modules=["q_proj"])
    assert list(load_lora(tmp_path).modules) == [f"layers.{i}.q_proj" for i in range(12)]
