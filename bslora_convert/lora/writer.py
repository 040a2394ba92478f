"""Factors by module name -> a standard PEFT LoRA directory that servers scale right.

All scaling is in B and `lora_alpha == r`; where ranks vary, `rank_pattern == alpha_pattern`, so that a reader which ignores
both patterns still multiplies by one.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.bslora.factors import Factors
from bslora_convert.files.tensorfile import write_tensors
from bslora_convert.lora.adapter import CONFIG_NAME, PREFIX

WEIGHTS_NAME = "adapter_model.safetensors"
SIDES = {
    "linear": ("lora_A.weight", "lora_B.weight"),
    "embedding": ("lora_embedding_A", "lora_embedding_B"),
}
INHERITED = (
    "base_model_name_or_path",
    "fan_in_fan_out",
    "modules_to_save",
    "revision",
    "target_modules",
    "task_type",
    "trainable_token_indices",
)


def save_lora(
    directory: Path,
    modules: Mapping[str, Factors],
    kinds: Mapping[str, str],
    carried: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: torch.dtype,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into an existing directory.

    config: PEFT fields to take over (`INHERITED`), those that are set. PEFT loads no rank 0: such a module gets a rank of zeros.
    """
    modules = {name: factors.padded(1) for name, factors in modules.items()}
    tensors = {PREFIX + name: tensor for name, tensor in carried.items()}
    for name, factors in modules.items():
        side_a, side_b = SIDES[kinds[name]]
        tensors[f"{PREFIX}{name}.{side_a}"] = factors.a.to(dtype)
        tensors[f"{PREFIX}{name}.{side_b}"] = factors.b.to(dtype)
    write_tensors(directory / WEIGHTS_NAME, tensors)
    text = json.dumps(peft_config({name: factors.rank for name, factors in modules.items()}, config), indent=2)
    (directory / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def peft_config(ranks: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, Any]:
    """A PEFT LoRA configuration for modules of these ranks."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT lets a key match the end of a longer name, and the first match win: longer names go first.
    pattern = {name: ranks[name] for name in sorted(ranks, key=len, reverse=True) if ranks[name] != rank}
    inherited = {field: config[field] for field in INHERITED if config.get(field) is not None}
    return {
        "peft_type": "LORA",
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "use_dora": False,
        "use_rslora": False,
        "target_modules": list(ranks),
        **inherited,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
