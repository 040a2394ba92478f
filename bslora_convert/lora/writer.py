"""Factors by module name -> a standard PEFT LoRA directory that servers scale right.

All scaling is in B and `lora_alpha == r`, the largest rank; where ranks vary, `rank_pattern == alpha_pattern`, so that a reader
which ignores both patterns and divides by `r` still multiplies by one. One that divides by a tensor's own rank needs equal ranks.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.bslora.factors import Factors
from bslora_convert.files.tensorfile import write_tensors
from bslora_convert.lora.experts import stacked
from bslora_convert.lora.fields import inherited
from bslora_convert.lora.keys import PREFIX
from bslora_convert.lora.names import key_for
from bslora_convert.lora.place import CONFIG_NAME
from bslora_convert.lora.targets import target_fields

WEIGHTS_NAME = "adapter_model.safetensors"
SIDES = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
    "tied_embedding": ("lora_embedding_A", "lora_embedding_B"),
}


def save_lora(
    directory: Path,
    modules: Mapping[str, Factors],
    kinds: Mapping[str, str],
    carried: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into an existing directory.

    config: the source's own fields, of which those are taken over that mean the same. PEFT loads no rank 0: such a module gets a
    rank of zeros; experts get as many as the largest rank asks for.
    """
    largest = max(1, *(factors.rank for factors in modules.values()))
    stack = stacked(modules)
    modules = {name: factors.padded(largest if name in stack else 1) for name, factors in modules.items()}
    tensors = {PREFIX + name: tensor for name, tensor in carried.items()}
    for name, factors in modules.items():
        side_a, side_b = SIDES[kinds[name]]
        tensors[f"{PREFIX}{name}.{side_a}"] = factors.a.to(dtype)
        tensors[f"{PREFIX}{name}.{side_b}"] = factors.b.to(dtype)
    write_tensors(directory / WEIGHTS_NAME, tensors)
    text = json.dumps(peft_config({name: factors.rank for name, factors in modules.items()}, config), indent=2)
    (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def peft_config(ranks: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT LoRA configuration for modules of these ranks: `r` is the largest, and each other rank has one pattern."""
    largest = max(ranks.values())
    by_rank: dict[int, list[str]] = {}
    for name, rank in ranks.items():
        by_rank.setdefault(rank, []).append(name)
    pattern = {
        key_for(names, [name for name in ranks if ranks[name] != rank]): rank
        for rank, names in sorted(by_rank.items(), reverse=True)
        if rank != largest
    }
    return {
        "peft_type": "LORA",
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
        **inherited(config),
        **target_fields(ranks, config),
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
