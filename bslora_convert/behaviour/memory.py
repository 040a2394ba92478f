"""How much memory training takes, and what to do when there is too little."""

from typing import Any

import torch

USABLE = 0.5  # share of the free memory that activations may take before they are recomputed instead


def peak_bytes(device: torch.device) -> int:
    """The most memory that the process (on a GPU: its allocator) has held so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(device: torch.device) -> int:
    """Memory that is free now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil

    return int(psutil.virtual_memory().available)


def activation_bytes(config: Any, rows: int, length: int, item: int) -> int:
    """What a backward pass keeps of a decoder: s·b·h·(34 + 5·a·s/h) bytes a layer at 16 bits (Korthikanti et al., 2022, eq. 1).

    rows b, length s, item: bytes a number; h and a the model's hidden size and heads.
    """
    hidden, heads = getattr(config, "hidden_size", 0), getattr(config, "num_attention_heads", 1)
    layers = getattr(config, "num_hidden_layers", 0)
    a_layer = rows * length * (34 * hidden + 5 * heads * length)
    return int(layers * a_layer * item / 2)


def enable_checkpointing(model: Any, rows: int, length: int, device: torch.device) -> bool:
    """Recomputes activations in the backward pass where they would not fit; says whether it does."""
    needed = activation_bytes(model.config, rows, length, model.dtype.itemsize)
    if needed <= USABLE * free_bytes(device) or not getattr(model, "supports_gradient_checkpointing", False):
        return False
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True  # transformers asks for both; nothing else of the model leaves evaluation mode
    return True
