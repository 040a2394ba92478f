"""What is saved loads in real PEFT and makes the same updates."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from bslora_convert.baselines import BASELINES
from bslora_convert.fit.source import measure
from bslora_convert.lora.writer import save_lora
from bslora_convert.modules.factors import Factors
from tests.baselines.planted import dense, drawn, names, source_of
from tests.planting import Product

KINDS = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (32, 64), "mlp.down_proj": (64, 128)}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()  # fmt: skip


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("form", "budget"), [("vera", 900), ("vb_lora", 1200), ("svd_uniform", 1000)])
def test_peft_makes_the_same_updates(form: str, budget: int, storage: torch.dtype, tmp_path: Path) -> None:
    random = drawn(0)
    pairs = {}
    for name, (_, kind) in names(2, KINDS).items():
        out, width = KINDS[kind]
        pairs[name] = Factors(0.1 * random(out, 4), random(4, width))
    source = source_of(pairs)
    fitted = BASELINES[form](source, budget, storage, 5)
    targets = sorted(kind.rpartition(".")[2] for kind in KINDS)
    config = {"task_type": "CAUSAL_LM", "target_modules": targets, "base_model_name_or_path": "a-base"}
    if fitted.save:
        fitted.save(tmp_path, config)
    else:
        save_lora(tmp_path, fitted.deltas, {name: source.kind(name) for name in pairs}, {}, config, storage)

    plain = model().state_dict()
    loaded = PeftModel.from_pretrained(model(), tmp_path)
    merged = loaded.merge_and_unload().state_dict()
    for name, delta in fitted.deltas.items():
        change = (merged[f"{name}.weight"] - plain[f"{name}.weight"]).double()
        assert float(change.norm()) > 0
        assert float((change - dense(delta)).norm()) <= 1e-5 * float(plain[f"{name}.weight"].norm())
    changed = {key for key in merged if not torch.equal(merged[key], plain[key])}
    assert changed == {f"{name}.weight" for name in fitted.deltas}


def test_files_hold_what_is_counted(tmp_path: Path) -> None:
    random = drawn(0)
    shapes = {name: KINDS[kind] for name, (_, kind) in names(2, KINDS).items()}
    source = source_of({name: Factors(random(out, 4), random(4, width)) for name, (out, width) in shapes.items()})
    for form in ("vera", "vb_lora"):
        fitted = BASELINES[form](source, 1200, torch.bfloat16, 5)
        assert fitted.save is not None
        fitted.save(tmp_path, {})
        stored = load_file(tmp_path / "adapter_model.safetensors")
        assert sum(tensor.numel() for tensor in stored.values()) == fitted.parameters
        assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == fitted.settings["rank"]


@pytest.mark.parametrize("form", ["vera", "vb_lora"])
def test_embeddings_are_fitted_but_not_saved(form: str) -> None:
    random = drawn(0)
    products = {"embed_tokens": Product(Factors(random(16, 2), random(2, 24)))}
    source = measure(products, {"embed_tokens": "embedding"})
    assert BASELINES[form](source, 60, torch.float32, 0).save is None
