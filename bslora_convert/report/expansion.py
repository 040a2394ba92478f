"""README.md of an expanded directory: a model card that says what it is, what it costs a server, and how it is loaded."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bslora_convert.files.card import CARD_NAME
from bslora_convert.report.commands import serving_options
from bslora_convert.report.environment import environment
from bslora_convert.report.metadata import front_matter, hub_name, metadata, model_class, name_of
from bslora_convert.results.adapter import Expanded

# How each engine is told to load the directory; `{base}`, `{rank}` and `{options}` are filled in.
USAGE: dict[str, str] = {
    "vllm": "vllm serve {base} {options} --lora-modules NAME=THIS_DIR",
    "sglang": "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} \\\n"
    "    --lora-target-modules all --lora-paths NAME=THIS_DIR",
    "lorax": "lorax-launcher --model-id {base}\n"
    '# a request\'s parameters: {{"adapter_id": "THIS_DIR", "adapter_source": "local"}}',
    "tgi": "LORA_ADAPTERS=NAME=THIS_DIR text-generation-launcher --model-id {base}",
    "trtllm": "LoRARequest('NAME', 1, 'THIS_DIR')    # with LoraConfig(max_lora_rank={rank}) of tensorrt_llm",
    "llama.cpp": "llama-server -m BASE.gguf --lora THIS_DIR/adapter.gguf",
    "mlx": "mlx_lm.generate --model {base} --adapter-path THIS_DIR --prompt '…'",
}
PYTHON = """from peft import PeftModel
from transformers import {model}

model = PeftModel.from_pretrained({model}.from_pretrained({base}), ".")
"""
LIBRARIES = {"lora": "peft", "mlx": "mlx"}
READERS = {"gguf": "llama.cpp", "mlx": "mlx"}


def write(place: Path, record: Expanded, config: Mapping[str, Any], source: Mapping[str, Any]) -> None:
    """Writes the card of one expansion; the authors' layout has none. source: metadata of the card that it came with."""
    if record.format == "official":
        return
    (place / CARD_NAME).write_text(render(record, config, source), encoding="utf-8")


def render(record: Expanded, config: Mapping[str, Any], source: Mapping[str, Any]) -> str:
    """The card of one expansion."""
    tags = ("lora", "bslora", *(["gguf"] if record.format == "gguf" else []))
    said = metadata(source, LIBRARIES.get(record.format), record.base_model, config.get("task_type"), tags)
    return (
        environment()
        .get_template("expansion.md")
        .render(
            record=record,
            usage=_usage(record, config),
            front_matter=front_matter(said),
            name=name_of(record.source["path"]),
        )
    )


def _usage(record: Expanded, config: Mapping[str, Any]) -> str:
    """A block that loads the directory: by the engine that it was written for, else in PEFT, run from this directory."""
    engine = record.engine or READERS.get(record.format)
    base = hub_name(record.base_model)
    if engine is None:
        code = PYTHON.format(model=model_class(config.get("task_type")), base=json.dumps(base))
        return f"```python\n{code}```"
    served = record.served
    rank = (served and served.max_lora_rank) or "N"
    options = shlex.join(serving_options(rank, served.target_modules, served.options) if served else ())
    return f"```\n{USAGE[engine].format(base=shlex.quote(base), rank=rank, options=options)}\n```"
