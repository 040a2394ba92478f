"""An adapter in MLX-LM's own layout: `adapters.safetensors` and `adapter_config.json`.

    y = W x + scale · (x lora_a) lora_b      lora_a (in, r) = Aᵀ, lora_b (r, out) = Bᵀ, scale = 1, one rank for all

`lora_parameters.keys` names kinds of modules from their layer on. MLX-LM adapts every module that a key names and loads what the
file has, so one that is not there keeps an lora_b of zeros.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from bslora_convert.files.tensorfile import read_tensors, write_tensors
from bslora_convert.modules.factors import Factors
from bslora_convert.modules.names import kind_of

WEIGHTS_NAME, CONFIG_NAME = "adapters.safetensors", "adapter_config.json"
EVERY_LAYER = -1
TRANSFORMERS = "model.language_model."  # what names of a language model beside a tower begin with there


def called(name: str) -> str:
    """A module's name in MLX-LM, whose models with a vision tower hold a language model whole."""
    return f"language_model.model.{rest}" if (rest := name.removeprefix(TRANSFORMERS)) != name else name


def write_mlx(place: Path, modules: Mapping[str, Factors], base_model: str | None, dtype: torch.dtype) -> None:
    """Writes both files; the modules have one rank."""
    tensors = {}
    for name, factors in modules.items():
        tensors[f"{called(name)}.lora_a"] = factors.a.T.to(dtype)
        tensors[f"{called(name)}.lora_b"] = factors.b.T.to(dtype)
    write_tensors(place / WEIGHTS_NAME, tensors)
    config = {
        "model": base_model,
        "fine_tune_type": "lora",
        "num_layers": EVERY_LAYER,
        "lora_parameters": {
            "rank": next(iter(modules.values())).rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({kind_of(name) for name in modules}),
        },
    }
    (place / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_mlx(place: Path, modules: Iterable[str]) -> dict[str, Factors]:
    """The modules of such a directory."""
    tensors = read_tensors(place / WEIGHTS_NAME)
    return {
        name: Factors(
            tensors[f"{called(name)}.lora_b"].T.to(torch.float32), tensors[f"{called(name)}.lora_a"].T.to(torch.float32)
        )
        for name in modules
    }
