"""A form that PEFT has a method of its own for -> a PEFT adapter directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from bslora_convert.files.tensorfile import write_tensors
from bslora_convert.lora.place import CONFIG_NAME
from bslora_convert.lora.writer import WEIGHTS_NAME

INHERITED = ("base_model_name_or_path", "fan_in_fan_out", "revision", "task_type")


def save_peft(
    directory: Path, config: Mapping[str, Any], own: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into an existing directory.

    config: the source's own fields, of which those are taken that say what it belongs to. own: the method's fields.
    """
    inherited = {field: config[field] for field in INHERITED if config.get(field) is not None}
    fields = {"bias": "none", "inference_mode": True, **inherited, **own}
    write_tensors(directory / WEIGHTS_NAME, tensors)
    (directory / CONFIG_NAME).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
