"""LoRA on an embedding whose weight the head shares: the head gets the update as well, whichever way the adapter runs."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from bslora_convert import Recipe, compress, expand, load_lora
from bslora_convert.behaviour.adapter import read_adapter
from bslora_convert.behaviour.attach import Attached
from bslora_convert.bslora.storage import load_compact
from bslora_convert.errors import Refused
from tests.peft.routes import EXACT, logits, merges, routes, same, stays_in_codes, switches

pytestmark = pytest.mark.filterwarnings("ignore")


def base(tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def source(directory: Path, tied: bool = True, **options: Any) -> Path:
    settings = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True, **options}
    model = get_peft_model(base(tied), LoraConfig(r=4, lora_alpha=8, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(directory)
    return directory


def without_copies(lora: Path) -> None:
    """As trainers save it that store tied tensors once."""
    path = lora / "adapter_model.safetensors"
    save_file({key: t for key, t in load_file(path).items() if "lm_head" not in key}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize(
    "targets",
    [
        ["q_proj", "embed_tokens"],
        ["q_proj", "lm_head"],
        r".*\.(q_proj|embed_tokens)|embed_tokens",
        "embed_tokens|.*tokens",
    ],
)
def test_the_head_gets_what_the_embedding_gets(tmp_path: Path, targets: Any, once: bool) -> None:
    lora = source(tmp_path / "lora", target_modules=targets)
    if once:
        without_copies(lora)
    found, claimed = routes(base(), lora, tmp_path)
    assert claimed < 1e-5
    same(found)
    stays_in_codes(base, lora, tmp_path / "coded")
    for directory in ("compact", "expanded"):
        assert json.loads((tmp_path / directory / "adapter_config.json").read_text())["ensure_weight_tying"] is True
    assert "lm_head" not in load_compact(tmp_path / "compact").form.modules
    assert any("counted once" in note for note in load_lora(lora).notes) != once
    model, adapter = base(), read_adapter(lora)  # as verify runs the source
    with Attached(model, adapter.form, adapter.carried, lora):
        attached = logits(model)
    expected = logits(PeftModel.from_pretrained(base(), str(lora)))
    assert torch.allclose(attached, expected, atol=1e-4)


@pytest.mark.parametrize(
    "recipe", [Recipe(transform="ke", budget=0.6, shared_size=16), Recipe(transform="none", bits=4)]
)
def test_within_the_claimed_error(tmp_path: Path, recipe: Recipe) -> None:
    lora = source(tmp_path / "lora")
    path = lora / "adapter_model.safetensors"
    save_file({k: t for k, t in load_file(path).items() if "base_layer" not in k}, path, metadata={"format": "pt"})
    found, claimed = routes(base(), lora, tmp_path, recipe)
    assert 0 < claimed < 0.9
    assert all(distance < 2 * claimed for distance in found.values())
    assert max(found.values()) - min(found.values()) < 0.01


@pytest.mark.parametrize("recipe", [EXACT, Recipe(transform="none", budget=0.5, dtype="float32")])
def test_loaders_that_fill_an_empty_adapter(tmp_path: Path, recipe: Recipe) -> None:
    """They need every tensor in the file, the head's copy too."""
    lora = source(tmp_path / "lora")
    without_copies(lora)
    compress(lora, tmp_path / "compact", recipe, report_html=False)
    expand(tmp_path / "compact", tmp_path / "expanded")
    expected = logits(PeftModel.from_pretrained(base(), str(tmp_path / "compact")))
    for directory in ("compact", "expanded"):
        model = PeftModel.from_pretrained(base(), str(tmp_path / directory), low_cpu_mem_usage=True)
        assert torch.allclose(logits(model), expected, atol=1e-3)
        through_transformers = base()
        through_transformers.load_adapter(str(tmp_path / directory))
        assert torch.allclose(logits(through_transformers), expected, atol=1e-3)


def test_targets_that_have_to_be_rewritten_still_tie(tmp_path: Path) -> None:
    lora = source(tmp_path / "lora")
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "lm_head"]}))
    same(routes(base(), lora, tmp_path)[0])
    assert isinstance(json.loads((tmp_path / "expanded" / "adapter_config.json").read_text())["target_modules"], str)


def test_a_base_that_ties_nothing_has_two_updates(tmp_path: Path) -> None:
    lora = source(tmp_path / "lora", tied=False, target_modules=["q_proj", "embed_tokens", "lm_head"])
    assert {"lm_head", "model.embed_tokens"} <= set(load_lora(lora).modules)
    same(routes(base(tied=False), lora, tmp_path)[0])


def test_without_the_setting_the_head_keeps_its_own(tmp_path: Path) -> None:
    lora = source(tmp_path / "lora", ensure_weight_tying=False)
    assert load_lora(lora).modules["model.embed_tokens"].kind == "embedding"
    same(routes(base(), lora, tmp_path)[0])


def test_modules_to_save_are_tied_too(tmp_path: Path) -> None:
    lora = source(tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    compress(lora, tmp_path / "compact", EXACT, report_html=False)
    first = logits(PeftModel.from_pretrained(base(), str(lora)))
    assert torch.allclose(logits(PeftModel.from_pretrained(base(), str(tmp_path / "compact"))), first, atol=1e-4)


def test_scalings_that_differ_are_refused(tmp_path: Path) -> None:
    lora = source(tmp_path / "lora", alpha_pattern={"embed_tokens": 32})
    with pytest.raises(
        Refused, match=r"ensure_weight_tying with patterns that scale lm_head by 2 and model\.embed_tokens"
    ):
        load_lora(lora)


def test_merging_saving_and_deleting_a_tied_adapter(tmp_path: Path) -> None:
    lora = source(tmp_path / "lora")
    without_copies(lora)
    compress(lora, tmp_path / "compact", EXACT, report_html=False)
    plain = logits(base())
    model = PeftModel.from_pretrained(base(), str(tmp_path / "compact"))
    expected = logits(model)
    assert float((expected - plain).norm()) > 1
    model.save_pretrained(tmp_path / "again")
    assert torch.allclose(logits(PeftModel.from_pretrained(base(), str(tmp_path / "again"))), expected, atol=1e-4)
    merges(model, expected, 1e-3)
    switches(model, tmp_path / "compact", expected, plain, 1e-3)
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(logits(merged), expected, atol=1e-3)
