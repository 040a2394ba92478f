"""vLLM's workers decode compact adapters themselves (`BSLORA_PLAN=compact`), so that nothing is written but a copy of the files.

vLLM loads an adapter by two class methods, whose names and first parameters are the same from 0.16 to 0.32 at least:

    PEFTHelper.from_local_dir(path, …)                                  the configuration
    LoRAModel.from_local_checkpoint(path, expected modules, helper, …)  the tensors, which it hands to `from_lora_tensors`

Both are wrapped: a directory that is a compact snapshot is answered here, any other one by vLLM. None of this is a public
interface, so the signatures are looked at first, and where they differ the caller falls back to writing LoRAs.
"""

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bslora_convert.bslora.storage import load_compact
from bslora_convert.lora.writer import factor_tensors
from bslora_convert.vllm.tenants import FIELDS_NAME

HELPER, CHECKPOINT, TENSORS = "from_local_dir", "from_local_checkpoint", "from_lora_tensors"
PASSED = ("lora_model_id", "device", "dtype", "model_vocab_size", "weights_mapper", "skip_prefixes")  # by name
WRAPPED = "_bslora_wrapped"


def unfit(helper: Any, model: Any) -> str | None:
    """Why these classes of vLLM are not those that are known here; None where they are."""
    wanted = {
        (helper, HELPER): ("lora_path", "max_position_embeddings"),
        (model, CHECKPOINT): ("lora_dir", "expected_lora_modules", "peft_helper", *PASSED),
        (model, TENSORS): ("tensors", "peft_helper", *PASSED),
        (helper, "from_dict"): ("config_dict",),
    }
    for (holder, name), parameters in wanted.items():
        method = getattr(holder, name, None)
        if method is None:
            return f"{holder.__name__}.{name} is missing"
        if getattr(method, WRAPPED, False):
            continue
        lacking = [one for one in parameters if one not in inspect.signature(method).parameters]
        if lacking:
            return f"{holder.__name__}.{name} has no {lacking[0]}"
    return None


def install(helper: Any, model: Any) -> None:
    """Wraps the two methods, once a process; `unfit` was asked before."""
    if getattr(getattr(model, CHECKPOINT), WRAPPED, False):
        return
    read_config, read_tensors = getattr(helper, HELPER).__func__, getattr(model, CHECKPOINT).__func__

    def from_local_dir(cls: Any, lora_path: str, max_position_embeddings: int | None, *rest: Any) -> Any:
        fields = Path(lora_path) / FIELDS_NAME
        if not fields.is_file():
            return read_config(cls, lora_path, max_position_embeddings, *rest)
        said = json.loads(fields.read_text(encoding="utf-8"))
        return cls.from_dict(said | {"vllm_max_position_embeddings": max_position_embeddings})

    def from_local_checkpoint(
        cls: Any, lora_dir: str, expected_lora_modules: set[str], peft_helper: Any, *rest: Any, **options: Any
    ) -> Any:
        if not (Path(lora_dir) / FIELDS_NAME).is_file():
            return read_tensors(cls, lora_dir, expected_lora_modules, peft_helper, *rest, **options)
        tensors = decoded(Path(lora_dir), expected_lora_modules)
        passed = {name: options[name] for name in PASSED if name in options}
        return cls.from_lora_tensors(tensors=tensors, peft_helper=peft_helper, **passed)

    for holder, name, wrapper in ((helper, HELPER, from_local_dir), (model, CHECKPOINT, from_local_checkpoint)):
        setattr(holder, name, classmethod(_marked(wrapper)))


def decoded(directory: Path, expected: set[str]) -> dict[str, Any]:
    """A compact adapter's tensors as a LoRA's file would have them.

    :raises ValueError: when vLLM can't adapt one of its modules.
    """
    adapter = load_compact(directory)
    form = adapter.form
    unknown = [n for n in form.modules if ".experts." not in n and n.rpartition(".")[2] not in expected]
    if unknown:
        raise ValueError(f"{directory}: {unknown[0]} is none of the modules that are served: {sorted(expected)}")
    kinds = {name: module.kind for name, module in form.modules.items()}
    modules = {name: form.delta(name).padded(1) for name in form.modules}
    return factor_tensors(modules, kinds, adapter.dtype)


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    setattr(function, WRAPPED, True)
    return function
