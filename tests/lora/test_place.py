"""Adapters of other formats are refused by what they are, with what to do; never by a file that is missing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bslora_convert.errors import InputError, Refused
from bslora_convert.lora import load_lora
from bslora_convert.verbs.inspect import inspect
from tests.planting import random_products, write_lora


def tensors(path: Path, *keys: str) -> None:
    save_file({key: torch.ones(2, 2) for key in keys}, path)


def sharded(place: Path) -> None:
    write_lora(place, random_products(layers=1))
    whole = place / "adapter_model.safetensors"
    names = [f"adapter_model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    held = load_file(whole)
    keys = sorted(held)
    for name, part in zip(names, (keys[:4], keys[4:]), strict=True):
        save_file({key: held[key] for key in part}, place / name)
    whole.unlink()
    index = {key: names[key not in keys[:4]] for key in keys}
    (place / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def mlx(place: Path) -> None:
    tensors(
        place / "adapters.safetensors",
        "model.layers.0.self_attn.q_proj.lora_a",
        "model.layers.0.self_attn.q_proj.lora_b",
    )
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0, "dropout": 0.0}, "num_layers": 4}
    (place / "adapter_config.json").write_text(json.dumps(config))


def kohya(place: Path) -> None:
    start = "lora_unet_down_blocks_0_attentions_0_proj_in"
    tensors(place / "style.safetensors", f"{start}.lora_down.weight", f"{start}.lora_up.weight", f"{start}.alpha")


def kohya_of_text(place: Path) -> None:
    tensors(place / "style.safetensors", "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight")


def renamed_kohya(place: Path) -> None:
    kohya(place)
    (place / "style.safetensors").rename(place / "adapter_model.safetensors")
    (place / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))


FORMATS: dict[str, tuple[Callable[[Path], None], str]] = {
    "shards": (sharded, "an adapter in several files"),
    "mlx": (mlx, "an MLX adapter"),
    "kohya": (kohya, "kohya / sd-scripts"),
    "kohya, text encoder": (kohya_of_text, "kohya / sd-scripts"),
    "kohya by PEFT's name": (renamed_kohya, "kohya / sd-scripts"),
    "diffusers": (lambda place: tensors(place / "pytorch_lora_weights.safetensors", "unet.a.lora_A.weight"), "a diffusers LoRA"),
    "lycoris": (lambda place: tensors(place / "a.safetensors", "x.hada_w1_a"), "LoHa"),
    "a model": (lambda place: tensors(place / "model.safetensors", "model.norm.weight"), "a whole model, not an adapter"),
    "gguf": (lambda place: (place / "lora.gguf").write_bytes(b"GGUF"), "a GGUF file"),
    "adapters": (lambda place: (place / "pytorch_adapter.bin").write_bytes(b"x"), "AdapterHub"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_are_called_by_their_name(tmp_path: Path, name: str) -> None:
    make, words = FORMATS[name]
    make(tmp_path)
    for path in (
        tmp_path,
        *(
            file
            for file in tmp_path.iterdir()
            if "kohya" in name or "gguf" in file.name or "adapters." in file.name or "-of-" in file.name
        ),
    ):
        with pytest.raises(Refused) as caught:
            load_lora(path)
        assert caught.value.exit_code == 3
        assert str(tmp_path) in str(caught.value)
        assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", "VERA", "SHARELORA", "BSLORA"])
def test_another_type_is_told_what_to_do(tmp_path: Path, kind: str) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1), peft_type=kind)
    with pytest.raises(Refused, match=r"peft_type is .*only 'LORA' adapters are converted \(.{20,}\)"):
        load_lora(lora)


def test_an_empty_directory_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load_lora(tmp_path)


def test_inspect_reads_a_scaling_that_is_given(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1))
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "lora_alpha"}))
    with pytest.raises(InputError, match="lora_alpha is missing"):
        inspect(lora)
    assert inspect(lora, lora_alpha=16)["convertible"]
