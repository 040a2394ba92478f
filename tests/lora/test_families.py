"""Model families end to end: LoRA by PEFT, compressed, expanded, loaded by PEFT again, the same forward pass."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from bslora_convert.bslora.storage import load_compact
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.verbs.compress import compress
from bslora_convert.verbs.expand import expand

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
        {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"},
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


def adapter(directory: Path, model: Any, **options: Any) -> torch.Tensor:
    """A saved adapter whose trained tensors are random; its logits."""
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **options)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return forward(model)


def load(model: Any, directory: Path) -> Any:
    return PeftModel.from_pretrained(model, str(directory)).eval()


def distance(first: torch.Tensor, second: torch.Tensor, base: torch.Tensor) -> float:
    """How far two outputs lie apart, relative to how far the second is from the base model's."""
    effect = (second - base).norm()
    assert effect > 0.01
    return float((first - second).norm() / effect)


def stored(directory: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(directory / "adapter_model.safetensors")
    return {key.removeprefix("base_model.model."): tensor for key, tensor in tensors.items()}


def saved_whole(directory: Path) -> dict[str, torch.Tensor]:
    """What PEFT saved beside the LoRA factors."""
    return {name: tensor for name, tensor in stored(directory).items() if ".lora_" not in name}


def assert_carried(lora: Path, compact: Path, again: Path) -> None:
    """Saved heads and tables travel bit by bit through both files and count nowhere."""
    saved, adapter = saved_whole(lora), load_compact(compact)
    assert set(adapter.carried) == set(saved) == set(saved_whole(again))
    for name, tensor in saved.items():
        for copy in (adapter.carried[name], saved_whole(again)[name]):
            assert copy.dtype == tensor.dtype
            assert torch.equal(copy, tensor)
    factors = sum(tensor.numel() for tensor in stored(compact).values()) - sum(t.numel() for t in saved.values())
    assert adapter.form.parameters == factors


@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_budget_gives_the_same_model(tmp_path: Path, family: str) -> None:
    lora, out, again = tmp_path / "lora", tmp_path / "out", tmp_path / "again"
    original = adapter(lora, build(family), **FAMILIES[family][1])
    record = compress(lora, out, Recipe(transform="none", budget=1.0, dtype="float32"), report_html=False)
    expand(out, again)
    base = forward(build(family))
    assert distance(forward(load(build(family), again)), original, base) < 1e-4
    if family in ("bert", "roberta"):
        assert {name.partition(".")[0] for name in saved_whole(lora)} == {"classifier"}
    else:
        assert not saved_whole(lora)
    assert_carried(lora, out, again)
    factors = sum(tensor.numel() for name, tensor in stored(lora).items() if ".lora_" in name)
    assert record["source"]["parameters"] == factors
    assert record["compact"]["parameters"] <= factors
    assert record["weight"]["relative_error"] < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_ke_expands_to_what_the_form_says(tmp_path: Path, family: str) -> None:
    lora, out, again = tmp_path / "lora", tmp_path / "out", tmp_path / "again"
    adapter(lora, build(family), **FAMILIES[family][1])
    record = compress(lora, out, Recipe(transform="ke", budget=0.6, dtype="float32"), report_html=False)
    assert record["compact"]["parameters"] <= 0.6 * record["source"]["parameters"]
    expand(out, again)
    assert_carried(lora, out, again)
    compact, model = load_compact(out), build(family)
    assert compact.form.shared_rank("intra") + compact.form.shared_rank("inter") > 0
    with torch.no_grad():
        for name, tensor in compact.carried.items():
            model.get_submodule(name.rpartition(".")[0]).get_parameter(name.rpartition(".")[2]).copy_(tensor)
        for name in compact.form.modules:
            delta = compact.form.delta(name)
            weight = model.get_submodule(name).weight
            weight += (delta.b @ delta.a).T if compact.config.get("fan_in_fan_out") else delta.b @ delta.a
    by_hand = forward(model)
    assert distance(forward(load(build(family), again)), by_hand, forward(build(family))) < 1e-4


QV = ["q_proj", "v_proj"]
BESIDE: dict[str, dict[str, Any]] = {
    "embedding factors": {"target_modules": [*QV, "embed_tokens"]},
    "embedding and head factors": {"target_modules": [*QV, "embed_tokens", "lm_head"]},
    "saved embedding and head": {"target_modules": QV, "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved norms": {"target_modules": QV, "modules_to_save": ["norm"]},
    "trained tokens": {"target_modules": QV, "trainable_token_indices": [3, 5, 11]},
    "trained tokens by name": {"target_modules": QV, "trainable_token_indices": {"embed_tokens": [3, 5, 11]}},
    "one layer": {"target_modules": QV, "layers_to_transform": [1]},
    "all but some": {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    "a regular expression": {"target_modules": r".*layers\.0\..*_proj"},
    "patterns": {"target_modules": QV, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {r".*1\.self_attn.*": 5}},
    "rslora": {"target_modules": QV, "use_rslora": True},
}


# A tied head is no weight of its own.
@pytest.mark.parametrize(
    ("what", "tied"), [(what, tied) for what in BESIDE for tied in (False, True) if not (tied and "head" in what)]
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_settings_of_a_lora_survive(tmp_path: Path, what: str, tied: bool) -> None:
    def base() -> Any:
        torch.manual_seed(0)
        return hf.LlamaForCausalLM(hf.LlamaConfig(**DECODER, num_key_value_heads=2, tie_word_embeddings=tied)).eval()

    lora, out, again = tmp_path / "lora", tmp_path / "out", tmp_path / "again"
    original = adapter(lora, base(), **BESIDE[what])
    compress(lora, out, Recipe(transform="none", budget=1.0, dtype="float32"), report_html=False)
    expand(out, again)
    assert distance(forward(load(base(), again)), original, forward(base())) < 1e-4
    assert_carried(lora, out, again)


def test_what_peft_needs_to_know_is_in_the_expanded_configuration(tmp_path: Path) -> None:
    lora, out, again = tmp_path / "lora", tmp_path / "out", tmp_path / "again"
    kept = {"fan_in_fan_out": True, "task_type": "CAUSAL_LM", "modules_to_save": ["ln_f"], "revision": "v2"}
    kept |= {"trainable_token_indices": {"wte": [3, 5]}}
    adapter(lora, build("gpt2"), target_modules=["c_attn"], **kept)
    compress(lora, out, Recipe(transform="none", budget=1.0), report_html=False)
    expand(out, again)
    for directory in (out, again):
        config = json.loads((directory / "adapter_config.json").read_text())
        assert {field: config.get(field) for field in kept} == kept
    assert (
        distance(forward(load(build("gpt2"), again)), forward(load(build("gpt2"), lora)), forward(build("gpt2"))) < 1e-4
    )


def test_encoder_and_decoder_share_within_their_own_layers(tmp_path: Path) -> None:
    adapter(tmp_path / "lora", build("t5"), **FAMILIES["t5"][1])
    compress(tmp_path / "lora", tmp_path / "out", Recipe(transform="ke", ranks=(1, 1, 1)), report_html=False)
    groups = load_compact(tmp_path / "out").form.shared["intra"]
    assert set(groups) == {f"{side}.block.{layer}" for side in ("encoder", "decoder") for layer in (0, 1)}
