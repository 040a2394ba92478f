"""What can't be converted faithfully is refused with exit code 3, naming the file, the field or tensor, and the reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from bslora_convert import Recipe, batch
from bslora_convert.errors import Refused
from bslora_convert.lora import load_lora
from bslora_convert.lora.adapter import FOREIGN
from bslora_convert.lora.fields import REFUSED
from bslora_convert.verbs.compress import compress
from bslora_convert.verbs.inspect import inspect
from tests.planting import random_products, write_lora

FIELDS: list[tuple[str, Any]] = [
    ("use_dora", True),
    ("lora_bias", True),
    ("init_lora_weights", "pissa"),
    ("init_lora_weights", "pissa_niter_16"),
    ("init_lora_weights", "olora"),
    ("init_lora_weights", "corda"),
    ("init_lora_weights", "loftq"),
    ("use_qalora", True),
    ("use_bdlora", {"x": 1}),
    ("alora_invocation_tokens", [1, 2]),
    ("layer_replication", [[0, 2], [1, 3]]),
    ("megatron_config", {"x": 1}),
    ("kasa_config", {"x": 1}),
    ("arrow_config", {"x": 1}),
    ("enable_lora", [True, False, True]),
    ("use_merged_linear", True),
]


def refused(lora: Path, *words: str) -> None:
    with pytest.raises(Refused) as caught:
        load_lora(lora)
    assert caught.value.exit_code == 3
    for word in words:
        assert word in str(caught.value)


def test_every_refusal_is_tried() -> None:
    assert {field for field, _ in FIELDS} == set(REFUSED)


@pytest.mark.parametrize(("field", "value"), FIELDS)
def test_fields(tmp_path: Path, field: str, value: Any) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1), **{field: value})
    refused(lora, str(lora / "adapter_config.json"), f"{field} is {value!r}", REFUSED[field].why)


def test_every_reason_is_given_at_once(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1), use_dora=True, kasa_config={"x": 1}, new_thing=2)
    refused(lora, "use_dora is True", "kasa_config is {'x': 1}", "new_thing is 2")


def test_a_refused_conversion_leaves_nothing(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1), use_dora=True)
    with pytest.raises(Refused):
        compress(lora, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_dora", False), ("loftq_config", {}), ("init_lora_weights", True), ("init_lora_weights", "eva"), ("bias", "none"),
     ("lora_ga_config", {"x": 1}), ("megatron_core", "megatron.core"), ("corda_config", None),
     ("corda_config", {"x": 1}), ("loftq_config", {"loftq_bits": 4})],
)  # fmt: skip
def test_harmless_values_are_not_refused(tmp_path: Path, field: str, value: Any) -> None:
    write_lora(tmp_path / "lora", random_products(layers=1), **{field: value})
    assert load_lora(tmp_path / "lora").modules


def test_every_default_of_a_real_configuration_is_accepted(tmp_path: Path) -> None:
    get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2)).save_pretrained(tmp_path)
    assert len(json.loads((tmp_path / "adapter_config.json").read_text())) > 30
    (note,) = load_lora(tmp_path).notes
    assert "every B is zero" in note


@pytest.mark.parametrize("value", [True, 1, 0.5, "on", [0], {"a": 0}])
def test_an_unknown_setting_is_refused_where_it_is_set(tmp_path: Path, value: Any) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1), use_newlora=value)
    refused(lora, str(lora / "adapter_config.json"), f"use_newlora is {value!r}")


def test_an_unknown_setting_is_ignored_where_the_user_answers_for_it(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1), foo_size=32, foo_kind="a", use_dora=False)
    refused(lora, "--ignore-field foo_size", "--ignore-field foo_kind")
    assert load_lora(lora, ignore=("foo_size", "foo_kind", "bar", "r")).notes == (
        "foo_size of the configuration was left out, as asked",
        "foo_kind of the configuration was left out, as asked",
        "bar is not in the configuration",
        "r was to be left out, and is not: it is known here",
    )
    recipe = Recipe(ignore_field=("foo_size", "foo_kind"))
    record = compress(lora, tmp_path / "out", recipe, report_html=False)
    assert record["recipe"]["ignore_field"] == ["foo_size", "foo_kind"]
    assert not {"foo_size", "foo_kind"} & set(json.loads((tmp_path / "out" / "adapter_config.json").read_text()))
    assert inspect(lora, ignore_field=("foo_size", "foo_kind")).convertible
    assert batch(tmp_path / "lora", tmp_path / "library", recipe, workers=0, report_html=False).ok == 1
    dora = write_lora(tmp_path / "dora", random_products(layers=1), use_dora=True)
    with pytest.raises(Refused, match="use_dora is True"):  # what is known to change the update is not ignored
        load_lora(dora, ignore=("use_dora",))


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_unknown_setting_is_harmless_where_it_is_not_set(tmp_path: Path, value: Any) -> None:
    assert load_lora(write_lora(tmp_path / "lora", random_products(layers=1), use_newlora=value)).modules


@pytest.mark.parametrize("bias", ["lora_only", "all"])
@pytest.mark.parametrize("modules_to_save", [None, ["classifier"]])
def test_trained_biases_are_found_by_their_tensors(tmp_path: Path, bias: str, modules_to_save: Any) -> None:
    """Refused where there are any, named; converted with a note where there are none but a saved module's own."""
    head = {"base_model.model.classifier.bias": torch.ones(3)} if modules_to_save else {}
    products = random_products(layers=1)
    lora = write_lora(tmp_path / "lora", products, extra=head, bias=bias, modules_to_save=modules_to_save)
    (note,) = load_lora(lora).notes
    assert f"bias is {bias!r}, but the weights hold no trained bias; read as none" in note
    compress(lora, tmp_path / "compact", report_html=False)
    key = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    lora = write_lora(
        tmp_path / "lora", products, extra={**head, key: torch.ones(64)}, bias=bias, modules_to_save=modules_to_save
    )
    refused(lora, "adapter_config.json", f"bias is {bias!r}", "q_proj.base_layer.bias", "trained biases")


def test_real_trained_biases(tmp_path: Path) -> None:
    get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2, bias="all")).save_pretrained(
        tmp_path
    )
    refused(tmp_path, "bias is 'all'", ".bias")


@pytest.mark.parametrize(
    ("field", "value"),
    [("lora_dtype", "bfloat16"), ("lorap_lr_ratio", 16.0), ("lorap_emb_lr", 1e-06), ("loraplus_lr_ratio", 16),
     ("learning_rate", 2e-4), ("unsloth_fixed", True), ("embedding_lr", 1e-5), ("num_train_epochs", 3), ("warmup_ratio", 0.1),
     ("random_state", 3407), ("gradient_checkpointing", True), ("transformers_version", "5.0"), ("merge_weights", True)],
)  # fmt: skip
def test_settings_of_trainers_change_no_update(tmp_path: Path, field: str, value: Any) -> None:
    assert load_lora(write_lora(tmp_path / "lora", random_products(layers=1), **{field: value})).modules


@pytest.mark.parametrize("field", ["lora_scale", "color", "use_lrd", "seedling"])
def test_a_name_that_only_looks_like_one_is_refused(tmp_path: Path, field: str) -> None:
    refused(write_lora(tmp_path / "lora", random_products(layers=1), **{field: 2}), f"{field} is 2")


KINDS = (
    "ADALORA",
    "LOHA",
    "LOKR",
    "VERA",
    "OFT",
    "PROMPT_TUNING",
    "IA3",
    "SHARELORA",
    "BSLORA",
    "lora",
    None,
    7,
    ["LORA"],
)


@pytest.mark.parametrize("kind", KINDS)
def test_other_peft_types(tmp_path: Path, kind: Any) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1), peft_type=kind)
    refused(lora, str(lora / "adapter_config.json"), f"peft_type is {kind!r}")


@pytest.mark.parametrize(
    "config",
    [
        AdaLoraConfig(target_modules=["0"], total_step=10),
        IA3Config(target_modules=["0"], feedforward_modules=[]),
        LoHaConfig(target_modules=["0"]),
        VeraConfig(target_modules=["0"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_real_adapters_of_other_types(tmp_path: Path, config: Any) -> None:
    get_peft_model(nn.Sequential(nn.Linear(8, 8)), config).save_pretrained(tmp_path)
    refused(tmp_path, "adapter_config.json", f"peft_type is {config.peft_type.value!r}")


@pytest.mark.parametrize("marker", [*FOREIGN, "lora_magnitude_vector.weight", "lora_new.weight"])
@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_foreign_tensors(tmp_path: Path, marker: str, prefix: str) -> None:
    key = f"{prefix}model.layers.0.self_attn.q_proj.{marker}"
    lora = write_lora(tmp_path / "lora", random_products(layers=1), extra={key: torch.ones(4)})
    reason = FOREIGN.get(marker.removesuffix(".weight"), "not a LoRA factor")
    refused(lora, str(lora / "adapter_model.safetensors"), key, reason)


@pytest.mark.parametrize(
    ("layer", "dimensions"), [(nn.Conv1d(3, 4, 3), 3), (nn.Conv2d(3, 4, 3), 4), (nn.Conv3d(3, 4, 3), 5)]
)
def test_convolutions(tmp_path: Path, layer: nn.Module, dimensions: int) -> None:
    model = get_peft_model(nn.Sequential(layer), LoraConfig(target_modules=["0"], r=2))
    model.save_pretrained(tmp_path)
    refused(tmp_path, "adapter_model.safetensors", "0.lora_", f"{dimensions} dimensions", "convolution")


def test_real_dora(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2, use_dora=True))
    model.save_pretrained(tmp_path)
    refused(tmp_path, "adapter_config.json", "use_dora", "DoRA")
    # Even where the configuration forgets to say so.
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "use_dora": False}))
    refused(tmp_path, "adapter_model.safetensors", "lora_magnitude_vector", "DoRA")


def test_real_lora_bias(tmp_path: Path) -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2, lora_bias=True))
    model.save_pretrained(tmp_path)
    refused(tmp_path, "adapter_config.json", "lora_bias")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "lora_bias": False}))
    refused(tmp_path, "adapter_model.safetensors", "lora_B.bias")


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_2", "olora"])
def test_real_initialisations_that_change_the_base(tmp_path: Path, kind: str) -> None:
    options = LoraConfig(target_modules=["0"], r=2, init_lora_weights=kind)
    get_peft_model(nn.Sequential(nn.Linear(8, 8)), options).save_pretrained(tmp_path)
    refused(tmp_path, "adapter_config.json", f"init_lora_weights is {kind!r}", "changes the base")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_factors_of_no_plain_float_type(tmp_path: Path, dtype: torch.dtype) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1))
    path = lora / "adapter_model.safetensors"
    save_file({key: tensor.to(dtype) for key, tensor in load_file(path).items()}, path)
    refused(lora, str(path), "lora_A.weight", str(dtype).removeprefix("torch."))


def test_multihead_attention(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2)

    get_peft_model(Model(), LoraConfig(target_modules=["mha"], r=2)).save_pretrained(tmp_path)
    with pytest.raises(Refused, match="MultiheadAttention"):
        load_lora(tmp_path)


def test_grouped_factors_of_a_fused_layer(tmp_path: Path) -> None:
    start = "base_model.model.transformer.h.0.attn.c_attn"
    extra = {f"{start}.lora_A.weight": torch.ones(4, 8), f"{start}.lora_B.weight": torch.ones(24, 4, 1)}
    lora = write_lora(tmp_path / "lora", {}, extra=extra)
    refused(lora, "adapter_model.safetensors", f"{start}.lora_B.weight", "fused QKV", "merge it")
