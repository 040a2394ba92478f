"""Every rule of PEFT's scaling, against the delta that real PEFT computes from the same file."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import Embedding
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from bslora_convert.errors import InputError
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


def adapted(model: Any, seed: int = 1, **options: Any) -> PeftModel:
    """A PEFT model whose factors are all random."""
    model = get_peft_model(model, LoraConfig(**{"target_modules": TARGETS, "r": 4, "lora_alpha": 12, **options}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def reread(model: PeftModel, directory: Path) -> PeftModel:
    """What PEFT itself makes of a directory, on the same base."""
    return PeftModel.from_pretrained(copy.deepcopy(model).unload(), str(directory))


def saved(model: Any, directory: Path, **options: Any) -> PeftModel:
    """A PEFT model saved and read back, since saving sorts the patterns and the first match wins."""
    model = adapted(model, **options)
    model.save_pretrained(directory)
    return reread(model, directory)


def configure(directory: Path, **changes: Any) -> None:
    """Changes fields of the configuration; unlike PEFT, leaves a pattern's keys in the order given."""
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def peft_deltas(model: PeftModel, adapter: str = "default") -> dict[str, torch.Tensor]:
    """ΔW of every adapted layer as PEFT computes it, turned to (out, in) where the base stores its weight the other way."""
    deltas = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            delta = layer.get_delta_weight(adapter).float()
            turned = isinstance(layer, Embedding) or layer.fan_in_fan_out
            deltas[name.removeprefix("base_model.model.")] = delta.T if turned else delta
    return deltas


def assert_same_deltas(model: PeftModel, path: Path, adapter: str = "default") -> None:
    read = load_lora(path).modules
    expected = peft_deltas(model, adapter)
    assert set(read) == set(expected)
    for name, delta in expected.items():
        assert delta.any()
        factors = read[name].factors()
        torch.testing.assert_close(
            factors.b @ factors.a, delta, rtol=1e-5, atol=1e-5 * float(delta.abs().max()), check_dtype=False, msg=name
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_alpha": 1},
        {"lora_alpha": 32, "r": 3},
        {"lora_alpha": 2.5},
        {"lora_alpha": -3},
        {"use_rslora": True},
        {"use_rslora": True, "r": 5, "rank_pattern": {"v_proj": 3}},
        {"use_rslora": True, "alpha_pattern": {r"layers\.1\..*": 40}},
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 5}},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 7, "v_proj": 3}, "use_rslora": True},
        {"rank_pattern": {r"layers\.[01]\.self_attn\..*": 2}},
        {"alpha_pattern": {"model.layers.1.mlp.down_proj": 9, "down_proj": 2}},
        {"alpha_pattern": {"q_proj|down_proj": 31}},
        {"alpha_pattern": {r"^model\.layers\.2\..*": 17}},
        {"alpha_pattern": {r"layers\.[02]\.(self_attn|mlp)\.\w+": 21}},
        {"alpha_pattern": {"layers.1": 99, "model.layers.1.self_attn.q": 99}},  # no end of any name: match nothing
        {"alpha_pattern": {"proj": 99}},  # not preceded by a dot in any name: matches nothing
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q_proj|o_proj)"},
        {"layers_to_transform": [0, 2]},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.3},
        {"target_modules": "all-linear", "exclude_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
    ],
)
def test_against_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_same_deltas(saved(llama(), tmp_path, **options), tmp_path)


@pytest.mark.parametrize("narrow_first", [True, False])
def test_the_first_alpha_pattern_that_matches_wins(tmp_path: Path, narrow_first: bool) -> None:
    pattern = {"model.layers.1.self_attn.q_proj": 40, r".*\.q_proj": 3}
    order = list(pattern) if narrow_first else list(reversed(pattern))
    model = saved(llama(), tmp_path)
    configure(tmp_path, alpha_pattern={key: pattern[key] for key in order})
    module = load_lora(tmp_path).modules["model.layers.1.self_attn.q_proj"]
    assert module.scaling == (40 / 4 if narrow_first else 3 / 4)
    assert_same_deltas(reread(model, tmp_path), tmp_path)


@pytest.mark.parametrize("narrow_first", [True, False])
def test_the_first_rank_pattern_that_matches_wins(tmp_path: Path, narrow_first: bool) -> None:
    pattern = {"model.layers.1.self_attn.q_proj": 6, r".*\.q_proj": 2}
    order = list(pattern) if narrow_first else list(reversed(pattern))
    ranks = {key: pattern[key] for key in order}
    model = adapted(llama(), rank_pattern=ranks)
    model.save_pretrained(tmp_path)
    configure(tmp_path, rank_pattern=ranks)
    adapter = load_lora(tmp_path)
    assert adapter.modules["model.layers.1.self_attn.q_proj"].rank == (6 if narrow_first else 2)
    assert adapter.notes == ()
    assert_same_deltas(reread(model, tmp_path), tmp_path)


def test_conv1d_with_fan_in_fan_out(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2, n_positions=16))
    options = {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True, "alpha_pattern": {"c_fc": 5}}
    model = saved(model, tmp_path, **options)
    modules = load_lora(tmp_path).modules
    assert modules["transformer.h.0.attn.c_attn"].shape == (96, 32)
    assert modules["transformer.h.1.mlp.c_proj"].shape == (32, 128)
    assert_same_deltas(model, tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"use_rslora": True}, {"rank_pattern": {"embed_tokens": 2}, "alpha_pattern": {"embed_tokens": 5}}]
)
def test_embeddings(tmp_path: Path, options: dict[str, Any]) -> None:
    model = saved(llama(), tmp_path, target_modules=["embed_tokens", "q_proj"], **options)
    adapter = load_lora(tmp_path)
    assert {name: module.kind for name, module in adapter.modules.items() if module.kind != "linear"} == {
        "model.embed_tokens": "embedding"
    }
    assert adapter.modules["model.embed_tokens"].shape == (32, 50)
    # PEFT stores the whole table beside its factors: carried along, never counted.
    assert set(adapter.carried) == {"model.embed_tokens.base_layer.weight"}
    assert adapter.parameters == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert_same_deltas(model, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_storage_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = saved(llama(), tmp_path, lora_alpha=13, r=3)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    adapter = load_lora(tmp_path)
    assert adapter.dtype == dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert {module.factors().b.dtype for module in adapter.modules.values()} == {compute}
    assert_same_deltas(reread(model, tmp_path), tmp_path)


def test_an_adapter_with_a_name_stands_in_a_folder(tmp_path: Path) -> None:
    options = LoraConfig(target_modules=TARGETS, r=4, lora_alpha=12, init_lora_weights=False)
    model = get_peft_model(llama(), options, adapter_name="german")
    model.save_pretrained(tmp_path)
    adapter = load_lora(tmp_path)
    assert adapter.weights == tmp_path / "german" / "adapter_model.safetensors"
    assert any("german" in note for note in adapter.notes)
    assert_same_deltas(model, tmp_path, "german")
    assert load_lora(tmp_path / "german").notes == ()


def test_keys_of_direct_injection_have_no_prefix(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path)
    injected = inject_adapter_in_model(LoraConfig(target_modules=TARGETS, r=4, lora_alpha=12), llama())
    with torch.no_grad():
        wrapped = dict(model.named_parameters())
        for name, parameter in injected.named_parameters():
            if "lora_" in name:
                parameter.copy_(wrapped["base_model.model." + name])
    tensors = get_peft_model_state_dict(injected)
    assert not any(key.startswith("base_model.") for key in tensors)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    assert_same_deltas(model, tmp_path)


WRAPPED = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_orig_mod", "_forward_module")


@pytest.mark.parametrize(
    "change",
    [
        *(lambda key, w=w: key.replace(".self_attn", f".{w}.self_attn").replace(".mlp", f".{w}.mlp") for w in WRAPPED),
        *(lambda key, w=w: key.replace(".lora_", f".{w}.lora_") for w in WRAPPED),
        lambda key: key.replace("model.layers.", "_fsdp_wrapped_module.model.layers.").replace(
            "layers.1.", "layers.1._orig_mod."
        ),
        lambda key: "module." + key,
        lambda key: "module._orig_mod." + key,
        lambda key: "_orig_mod.module." + key,
        lambda key: key.replace("base_model.model.", "base_model.model.module."),
        lambda key: key.replace("base_model.model.", "module.base_model.model.module._orig_mod."),
        lambda key: key.replace("base_model.model.", "module."),
        lambda key: "base_model.model." + key,
        lambda key: "base_model.model.base_model.model." + key,
        lambda key: key.replace("base_model.model.", "base_model.model._orig_mod."),
        lambda key: "_orig_mod." + key,
        lambda key: key.replace("model.layers.", "model._orig_mod.layers."),
        lambda key: key.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        ),
    ],
)
def test_prefixes(tmp_path: Path, change: Any) -> None:
    model = saved(llama(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    before = load_file(path)
    save_file({change(key): tensor for key, tensor in before.items()}, path)
    assert set(load_file(path)).isdisjoint(before)
    assert_same_deltas(model, tmp_path)


@pytest.mark.parametrize("wrapper", ["_checkpoint_wrapped_module", "_orig_mod", "module"])
def test_a_wrapper_is_named_in_a_note(tmp_path: Path, wrapper: str) -> None:
    saved(llama(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key.replace("model.layers", f"{wrapper}.model.layers"): t for key, t in load_file(path).items()}, path)
    (note,) = load_lora(tmp_path).notes
    assert f"the keys hold {wrapper}, a wrapper's name" in note


def test_a_module_that_is_called_module_keeps_its_name(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ModuleDict({"q_proj": nn.Linear(4, 4)})
            self.other = nn.ModuleDict({"module": nn.ModuleDict({"q_proj": nn.Linear(4, 4)})})

    saved(Named(), tmp_path, target_modules=["q_proj"])
    adapter = load_lora(tmp_path)
    assert set(adapter.modules) == {"module.q_proj", "other.module.q_proj"}
    assert adapter.notes == ()


def test_a_bin_file_holds_the_same(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    torch.save(load_file(path), tmp_path / "adapter_model.bin")
    path.unlink()
    assert_same_deltas(model, tmp_path)
    assert_same_deltas(model, tmp_path / "adapter_model.bin")


@pytest.mark.parametrize("field", [{"r": 16}, {"rank_pattern": {".*": 16}}])
def test_the_tensors_win_over_the_configurations_rank(tmp_path: Path, field: dict[str, Any]) -> None:
    model = saved(llama(), tmp_path, r=4, lora_alpha=12)
    configure(tmp_path, **field)
    adapter = load_lora(tmp_path)
    assert {module.rank for module in adapter.modules.values()} == {4}
    (note,) = adapter.notes
    assert "9 of 9 modules" in note
    assert "4, not 16" in note
    assert "taken as the truth, so its scaling is 12/4 = 3" in note
    assert_same_deltas(model, tmp_path)


def without(directory: Path, *fields: str) -> None:
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({field: value for field, value in config.items() if field not in fields}))


def test_a_scaling_is_never_guessed(tmp_path: Path) -> None:
    model = saved(llama(), tmp_path, r=4, lora_alpha=12)
    without(tmp_path, "lora_alpha")
    with pytest.raises(InputError, match=r"adapter_config\.json: lora_alpha is missing.*--lora-alpha") as caught:
        load_lora(tmp_path)
    assert caught.value.exit_code == 2
    adapter = load_lora(tmp_path, alpha=12)
    assert adapter.config.raw["lora_alpha"] == 12
    assert {module.scaling for module in adapter.modules.values()} == {3.0}
    configure(tmp_path, lora_alpha=12)  # back, for PEFT
    assert_same_deltas(reread(model, tmp_path), tmp_path)


@pytest.mark.parametrize("gone", [("lora_alpha",), ("lora_alpha", "r"), ("lora_alpha", "r", "peft_type", "use_rslora")])
def test_what_is_missing_can_be_given(tmp_path: Path, gone: tuple[str, ...]) -> None:
    saved(llama(), tmp_path, r=4, lora_alpha=12)
    without(tmp_path, *gone)
    rslora = True if "use_rslora" in gone else None
    modules = load_lora(tmp_path, alpha=12, rslora=rslora).modules
    assert {module.scaling for module in modules.values()} == {12 / 4**0.5 if rslora else 12 / 4}


@pytest.mark.parametrize("given", [{"alpha": 13}, {"rslora": True}, {"alpha": 12, "rslora": True}])
def test_what_is_given_never_overrules_the_file(tmp_path: Path, given: dict[str, Any]) -> None:
    saved(llama(), tmp_path, r=4, lora_alpha=12)
    assert load_lora(tmp_path, alpha=12, rslora=False).notes == ()
    with pytest.raises(InputError, match=r"lora_alpha is 12 there and 13|use_rslora is False there and True"):
        load_lora(tmp_path, **given)


@pytest.mark.parametrize(
    ("field", "note"),
    [("r", "r is missing in the configuration; 4, by the tensors"), ("peft_type", "peft_type is missing")],
)
def test_what_the_tensors_say_needs_no_field(tmp_path: Path, field: str, note: str) -> None:
    saved(llama(), tmp_path, r=4, lora_alpha=12)
    without(tmp_path, field)
    adapter = load_lora(tmp_path)
    assert any(note in said for said in adapter.notes)
    assert {module.scaling for module in adapter.modules.values()} == {3.0}


def test_modules_are_in_natural_order(tmp_path: Path) -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(4, 4)}) for _ in range(12)])

    saved(Deep(), tmp_path, target_modules=["q_proj"])
    assert list(load_lora(tmp_path).modules) == [f"layers.{i}.q_proj" for i in range(12)]
