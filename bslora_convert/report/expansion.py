"""README.md of an expanded directory: a model card that says what it is, what it costs a server, and how it is loaded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bslora_convert.report.page import environment

CARD_NAME = "README.md"
BASE = "BASE_MODEL"

# How each engine is told to load the directory; `{base}` and `{rank}` are filled in.
USAGE: dict[str | None, str] = {
    None: "model = PeftModel.from_pretrained(base, 'THIS_DIR')    # PEFT",
    "vllm": "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME=THIS_DIR",
    "sglang": "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} \\\n"
    "    --lora-paths NAME=THIS_DIR",
    "lorax": "lorax-launcher --model-id {base}\n"
    '# a request\'s parameters: {{"adapter_id": "THIS_DIR", "adapter_source": "local"}}',
    "tgi": "LORA_ADAPTERS=NAME=THIS_DIR text-generation-launcher --model-id {base}",
    "trtllm": "LoRARequest('NAME', 1, 'THIS_DIR')    # with LoraConfig(max_lora_rank={rank}) of tensorrt_llm",
    "llama.cpp": "llama-server -m BASE.gguf --lora THIS_DIR/adapter.gguf",
    "mlx": "mlx_lm.generate --model {base} --adapter-path THIS_DIR --prompt '…'",
}
READERS = {"gguf": "llama.cpp", "mlx": "mlx"}


def write(place: Path, record: Mapping[str, Any]) -> None:
    """Writes the card of one expansion; the authors' layout has none."""
    if record["format"] == "official":
        return
    (place / CARD_NAME).write_text(render(record), encoding="utf-8")


def render(record: Mapping[str, Any]) -> str:
    """The card of one expansion."""
    engine = record["engine"] or READERS.get(record["format"])
    rank = (record["served"] or {}).get("max_lora_rank")
    usage = USAGE[engine].format(base=record["base_model"] or BASE, rank=rank or "N")
    return environment().get_template("expansion.md").render(record=record, usage=usage)
