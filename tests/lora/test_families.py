"""Model families end to end: LoRA by PEFT, compressed, expanded, loaded by PEFT again, the same forward pass."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model

from bslora_convert.bslora.storage import load_compact
from bslora_convert.compress import compress
from bslora_convert.expand import expand
from bslora_convert.recipe import Recipe

IDS = torch.arange(3, 19).reshape(2, 8)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50}
DECODER = {**SMALL, "intermediate_size": 64, "max_position_embeddings": 64}
BERT = {**DECODER, "num_labels": 3}

Build = Callable[[], Any]

FAMILIES: dict[str, tuple[Build, dict[str, Any]]] = {
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, num_key_value_heads=2)),
        {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    ),
    "qwen2": (
        lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**DECODER, num_key_value_heads=2)),
        {"target_modules": "all-linear"},
    ),
    "gemma": (
        lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**DECODER, num_key_value_heads=1, head_dim=16)),
        {"target_modules": ["q_proj", "k_proj", "down_proj"]},
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=32)),
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "bert": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
        {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"},
    ),
    "roberta": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**BERT)),
        {"target_modules": ["query", "value"], "task_type": "SEQ_CLS"},
    ),
    "t5": (
        lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(vocab_size=50, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4, decoder_start_token_id=0)
        ),
        {"target_modules": ["q", "v", "wi", "wo"]},
    ),
    "bart": (
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(
                vocab_size=50, d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
                encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64,
            )
        ),
        {"target_modules": ["q_proj", "v_proj", "fc1", "fc2"]},
    ),
    "opt": (
        lambda: hf.OPTForCausalLM(hf.OPTConfig(**SMALL, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32)),
        {"target_modules": ["q_proj", "v_proj", "fc1"]},
    ),
    "bloom": (
        lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4)),
        {"target_modules": ["query_key_value", "dense_h_to_4h"]},
    ),
    "pythia": (
        lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**DECODER)),
        {"target_modules": ["query_key_value", "dense_4h_to_h"]},
    ),
}  # fmt: skip


def build(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


@torch.no_grad()
def forward(model: Any) -> torch.Tensor:
    extra = {"decoder_input_ids": IDS.flip(1)} if getattr(model.config, "is_encoder_decoder", False) else {}
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS), **extra).logits


def adapter(family: str, directory: Path) -> torch.Tensor:
    """A saved adapter with random factors; its logits."""
    model = get_peft_model(build(family), LoraConfig(r=4, lora_alpha=8, **FAMILIES[family][1])).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return forward(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_budget_gives_the_same_model(tmp_path: Path, family: str) -> None:
    original = adapter(family, tmp_path / "lora")
    record = compress(
        tmp_path / "lora", tmp_path / "out", Recipe(transform="none", budget=1.0, dtype="float32"), report_html=False
    )
    expand(tmp_path / "out", tmp_path / "again")
    again = forward(PeftModel.from_pretrained(build(family), str(tmp_path / "again")).eval())
    effect = (original - forward(build(family))).norm()
    assert effect > 0.01
    assert float((again - original).norm() / effect) < 1e-4
    compact = load_compact(tmp_path / "out")
    if family in ("bert", "roberta"):
        heads = [name for name in compact.carried if name.startswith("classifier")]
        assert heads
        assert not any(name.startswith("classifier") for name in compact.form.modules)
    assert record["source"]["parameters"] == sum(4 * sum(m.shape) for m in compact.form.modules.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_ke_expands_to_what_the_form_says(tmp_path: Path, family: str) -> None:
    adapter(family, tmp_path / "lora")
    compress(
        tmp_path / "lora", tmp_path / "out", Recipe(transform="ke", ranks=(2, 1, 1), dtype="float32"), report_html=False
    )
    expand(tmp_path / "out", tmp_path / "again")
    again = forward(PeftModel.from_pretrained(build(family), str(tmp_path / "again")).eval())
    compact, model = load_compact(tmp_path / "out"), build(family)
    with torch.no_grad():
        for name, tensor in compact.carried.items():
            model.get_submodule(name.rpartition(".")[0]).get_parameter(name.rpartition(".")[2]).copy_(tensor)
        for name in compact.form.modules:
            delta = compact.form.delta(name)
            weight = model.get_submodule(name).weight
            weight += (delta.b @ delta.a).T if compact.config.get("fan_in_fan_out") else delta.b @ delta.a
    by_hand = forward(model)
    effect = (by_hand - forward(build(family))).norm()
    assert float((again - by_hand).norm() / effect) < 1e-4


def test_encoder_and_decoder_share_within_their_own_layers(tmp_path: Path) -> None:
    adapter("t5", tmp_path / "lora")
    compress(tmp_path / "lora", tmp_path / "out", Recipe(transform="ke", ranks=(1, 1, 1)), report_html=False)
    groups = load_compact(tmp_path / "out").form.shared["intra"]
    assert set(groups) == {f"{side}.block.{layer}" for side in ("encoder", "decoder") for layer in (0, 1)}
