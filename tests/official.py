"""Adapters in the BSLoRA authors' layout, made on the fly, and their deltas by the formulas of the paper."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bslora_convert.modules.factors import Shape

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
# Grouped-query attention: k and v are half as high as q.
KINDS: dict[str, Shape] = {
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "mlp.up_proj": (64, 32),
    "mlp.down_proj": (32, 64),
}
SIZES = {"slice": (64, 64), "gate": (24, 24), "kron": (16, 16)}

FIELDS = [
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "fan_in_fan_out",
    "gate_share_size",
    "inference_mode",
    "init_lora_weights",
    "kron_share_size",
    "layer_replication",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r_inter",
    "r_intra",
    "r_local",
    "revision",
    "share_mode",
    "target_modules",
    "task_type",
]


def official_tensors(
    mode: str,
    ranks: tuple[int, int, int] = (2, 4, 8),
    layers: int = 2,
    kinds: Mapping[str, Shape] = KINDS,
    size: Shape | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random tensors under the authors' keys, shared ones repeated under every module."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def pair(rank: int) -> dict[str, Tensor]:
        return {"A": random(rank, columns), "B": random(rows, rank)}

    local, intra, inter = ranks
    rows, columns = size or SIZES[mode]
    everyone = pair(inter)
    tensors = {}
    for layer in range(layers):
        shared = {"intra": pair(intra), "inter": everyone}
        for kind, (out, width) in kinds.items():
            stem = f"{PREFIX}model.layers.{layer}.{kind}.sharelora_"
            tensors[f"{stem}lora_A.local.weight"] = random(local, width)
            tensors[f"{stem}lora_B.local.weight"] = random(out, local)
            for level, held in shared.items():
                for side, tensor in held.items():
                    tensors[f"{stem}lora_{side}.{level}.weight"] = tensor.clone()
                if mode == "kron":
                    tensors[f"{stem}sampler.{level}_sampler_A.weight"] = random(1, width // columns)
                    tensors[f"{stem}sampler.{level}_sampler_B.weight"] = random(out // rows, 1)
                if mode == "gate":
                    for side, length in (("input", width), ("output", out)):
                        ends = ((1, length), (rows, 1)) if side == "input" else ((1, rows), (length, 1))
                        for way, shape in zip(("down", "up"), ends, strict=True):
                            tensors[f"{stem}gate.{level}_{side}_gate_{way}.weight"] = random(*shape)
    return tensors


def write_official(
    directory: Path, tensors: Mapping[str, Tensor], mode: str, ranks: tuple[int, int, int] = (2, 4, 8), **config: Any
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    fields = {
        **dict.fromkeys(FIELDS),
        "base_model_name_or_path": "a-llama",
        "bias": "none",
        "fan_in_fan_out": False,
        "gate_share_size": SIZES["gate"][0],
        "inference_mode": True,
        "init_lora_weights": True,
        "kron_share_size": SIZES["kron"][0],
        "lora_dropout": 0.05,
        "peft_type": "SHARELORA",
        **dict(zip(("r_local", "r_intra", "r_inter"), ranks, strict=True)),
        "share_mode": mode,
        "target_modules": sorted(kind.rpartition(".")[2] for kind in KINDS),
        "task_type": "CAUSAL_LM",
        **config,
    }
    save_file(dict(tensors), directory / WEIGHTS, metadata={"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(fields))
    return directory


def official(
    directory: Path, mode: str, ranks: tuple[int, int, int] = (2, 4, 8), dtype: torch.dtype = torch.float32
) -> Path:
    tensors = {key: tensor.to(dtype) for key, tensor in official_tensors(mode, ranks).items()}
    return write_official(directory, tensors, mode, ranks)


def dense(tensors: Mapping[str, Tensor], mode: str, module: str, shape: Shape) -> Tensor:
    """ΔW of one module by the authors' formulas, written out: twice the sum of local, intra and inter."""
    held = {key.partition(f"{module}.sharelora_")[2]: t.double() for key, t in tensors.items() if f".{module}." in key}
    out, width = shape
    total = held["lora_B.local.weight"] @ held["lora_A.local.weight"]
    for level in ("intra", "inter"):
        a, b = held[f"lora_A.{level}.weight"], held[f"lora_B.{level}.weight"]
        if mode == "slice":
            across, down = (a.shape[1] - width) // 2, (b.shape[0] - out) // 2
            total = total + b[down : down + out] @ a[:, across : across + width]
        elif mode == "gate":
            gates = {
                name: held[f"gate.{level}_{name}.weight"]
                for name in ("input_gate_down", "input_gate_up", "output_gate_down", "output_gate_up")
            }
            inward = gates["input_gate_up"] @ gates["input_gate_down"]
            total = total + gates["output_gate_up"] @ gates["output_gate_down"] @ b @ a @ inward
        elif a.shape[0]:
            kernel_a, kernel_b = (held[f"sampler.{level}_sampler_{side}.weight"] for side in "AB")
            total = total + torch.kron(kernel_b, b) @ torch.kron(kernel_a, a)
    return 2 * total
