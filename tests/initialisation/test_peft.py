"""Adapters that the installed PEFT makes of each family's modules, and what is found of them."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from bslora_convert.initialisation.drawn import Module
from bslora_convert.initialisation.found import Found, find
from tests.initialisation.planted import assert_draws, trained

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 101,
}
GROUPED = {**SIZES, "num_key_value_heads": 2}
T5 = {
    "d_model": 64,
    "d_ff": 96,
    "d_kv": 16,
    "num_heads": 4,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "vocab_size": 101,
}
ALL = "all-linear"


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))


def qwen2() -> Any:
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED))


def gemma() -> Any:
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**GROUPED, head_dim=16))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=101))


def t5() -> Any:
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))


def bert() -> Any:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES))


def switch() -> Any:
    config = transformers.SwitchTransformersConfig(
        **T5, num_experts=3, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def qwen2_moe() -> Any:
    sizes = {**GROUPED, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80, "num_experts": 4}
    return transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**sizes))


def made(model: Any, before: Callable[[], Any] = lambda: None, **options: Any) -> dict[str, Module]:
    """The modules of a fresh adapter."""
    torch.manual_seed(42)
    before()
    tensors = peft.get_peft_model_state_dict(peft.get_peft_model(model, peft.LoraConfig(**{"r": 8, **options})))
    modules = {}
    for key, a in tensors.items():
        for part in ("lora_A", "lora_embedding_A"):
            name, found, end = key.partition(f".{part}")
            if found and end in ("", ".weight"):
                b = tensors[key.replace("_A", "_B")]
                kind: Literal["linear", "embedding"] = "embedding" if "emb" in part else "linear"
                modules[name.removeprefix("base_model.model.")] = Module(a.clone(), len(b), kind)
    return modules


def assert_all_found(modules: dict[str, Module], offset: int = 0, dtype: torch.dtype = torch.float32) -> Found:
    found = find(trained(modules, dtype=dtype))
    assert found is not None
    assert found.seed == 42
    assert set(found.places) == {name for name, module in modules.items() if module.kind == "linear"}
    assert found.offset == offset
    assert found.cosine > 0.99
    assert_draws(found, modules)
    return found


@pytest.mark.parametrize(
    ("model", "options", "count"),
    [
        (llama, {"target_modules": ALL}, 14),
        (llama, {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}, 4),
        (llama, {"target_modules": ALL, "rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 16}}, 14),
        (llama, {"target_modules": ALL, "lora_bias": True}, 14),
        (llama, {"target_modules": ["q_proj", "down_proj", "lm_head"], "layers_to_transform": [1]}, 3),
        (llama, {"target_modules": ALL, "use_dora": True}, 14),
        (qwen2, {"target_modules": ALL}, 14),
        (gemma, {"target_modules": ALL}, 14),
        (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}, 8),
        (t5, {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}, 32),
        (bert, {"target_modules": ["query", "key", "value", "dense"], "task_type": "SEQ_CLS"}, 13),
        (switch, {"target_modules": ["q", "k", "v", "o", "wi", "wo"]}, 40),
        (
            qwen2_moe,
            {"target_modules": ["q_proj", "v_proj", "down_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
            8,
        ),
    ],
)
def test_every_module_is_found(model: Callable[[], Any], options: dict[str, Any], count: int) -> None:
    assert len(assert_all_found(made(model(), **options)).places) == count


def test_bfloat16() -> None:
    assert_all_found(made(llama(), target_modules=ALL), dtype=torch.bfloat16)


def test_a_head_drawn_before_is_an_offset() -> None:
    assert_all_found(made(llama(), before=lambda: torch.nn.Linear(64, 3), target_modules=ALL), offset=64 * 3 + 3)


@pytest.mark.parametrize("vocabulary", [101, 112])
def test_an_embedding_is_passed(vocabulary: int) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, "vocab_size": vocabulary}))
    modules = made(model, target_modules=["embed_tokens", "q_proj", "down_proj"])
    assert_all_found(modules, offset=vocabulary * 8 + (16 if vocabulary * 8 % 16 else 0) + 2 * 64 * 8)
