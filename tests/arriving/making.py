"""Adapters as trainers leave them: made by PEFT on tiny models of many families, their numbers random."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import bslora_convert.peft  # noqa: F401  registers the tuner

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1,
    "topk_group": 1, "num_key_value_heads": 4,
}  # fmt: skip
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {  # the model's class, its configuration's, and what is its own
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "scored": ("LlamaForSequenceClassification", "LlamaConfig", {"num_labels": 1}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            **EXPERTS,
        },
    ),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {"head_dim": 8}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", {}),
    "granite": ("GraniteForCausalLM", "GraniteConfig", {}),
    "lfm2": ("Lfm2ForCausalLM", "Lfm2Config", {"layer_types": ["conv", "full_attention"], "block_multiple_of": 8}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {"head_dim": 8, **EXPERTS}),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", LATENT),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", {**LATENT, "head_dim": 8, "num_key_value_heads": 2}),
}
IDS = torch.tensor([[1, 3, 5, 60, 7, 3], [9, 60, 12, 4, 33, 2]])


def base(family: str, vocabulary: int | None = None) -> Any:
    """A tiny model in float64, the same each time."""
    kind, configuration, own = FAMILIES[family]
    config = getattr(transformers, configuration)(**{**SIZES, **own})
    config._experts_implementation = "eager"  # the grouped one takes no float64
    with torch.random.fork_rng():
        torch.manual_seed(7)  # of what transformers draws itself, one-dimensional parameters
        model: Any = getattr(transformers, kind)(config)
    numbers = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith((".bias", "_bias", "sinks")):
            parameter.data = torch.randn(parameter.shape, generator=numbers) * 0.12
    model.tie_weights()
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return model.double().eval()


def adapted(place: Path, family: str, vocabulary: int | None = None, **lora: Any) -> Path:
    """A LoRA on a tiny model with all its parts trained, as PEFT saves it."""
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": "all-linear", **lora}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base(family, vocabulary).float(), LoraConfig(**options))
        numbers = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("lora_", "trainable_tokens_delta", "modules_to_save")):
                parameter.data = parameter.data * 0.5 + torch.randn(parameter.shape, generator=numbers) * 0.15
        model.save_pretrained(place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    return place


def loaded(place: Path, family: str, vocabulary: int | None = None) -> PeftModel:
    """An adapter on its model, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = PeftModel.from_pretrained(base(family, vocabulary), str(place), autocast_adapter_dtype=False)
    return found.double().eval()  # type: ignore[no-any-return]


def answers(model: nn.Module) -> Tensor:
    """The model's logits."""
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def apart(first: Tensor, second: Tensor) -> float:
    """Relative difference of two answers."""
    return float((first - second).norm() / second.norm())
