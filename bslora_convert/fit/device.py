"""Where to compute."""

import os

import torch

from bslora_convert.errors import RecipeError


def pick_device(name: str) -> torch.device:
    """A device by name; auto = the GPU where there is one, each of several processes its own.

    :raises RecipeError: when it can't be had.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise RecipeError(f"device is {name!r}: auto, cpu, cuda or cuda:N is allowed", "device") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(f"device is {name}: no CUDA device is available here; cpu is allowed", "device")
    if device.type == "cuda":
        torch.linalg.inv(torch.ones(1, 1, device=device))  # loads its library, which several threads at once break
    return device
