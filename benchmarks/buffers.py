"""What a slot takes in a real vLLM, beside what is counted for it here (`layers/slots.py`).

    python benchmarks/buffers.py --python build/vllm/bin/python

For tiny models of three families and adapters of some kinds of modules: bytes of the buffers that vLLM makes for one adapter of
rank 16 in bfloat16, told the adapter's kinds (`--lora-target-modules`) and not told, and the count. A minute a model.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from bslora_convert.layers.slots import bytes_of, target_modules, width_of

RANK = 16
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
MODELS = {
    "Llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "Qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "Gemma3": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}
KINDS = (
    ("q_proj", "v_proj"), ("q_proj",), ("down_proj",), ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)  # fmt: skip
COUNTING = """
import json, os, sys
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR",
               "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "HF_HUB_OFFLINE": "1"}
from vllm import LLM

def held(model):
    found = [getattr(module, name, None) for module in model.modules() for name in ("lora_a_stacked", "lora_b_stacked")]
    return sum(one.nbytes for own in found if own is not None for one in (own if isinstance(own, tuple) else (own,)))

if __name__ == "__main__":
    model, rank, kinds = json.loads(sys.argv[1])
    llm = LLM(model=model, skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=64, enable_lora=True,
              max_loras=1, max_lora_rank=rank, lora_target_modules=kinds)
    print("HELD", llm.apply_model(held)[0])
"""


def reserved(python: str, model: Path, kinds: list[str] | None) -> int:
    """Bytes of the buffers of one adapter."""
    with tempfile.TemporaryDirectory() as room:
        script = Path(room) / "counting.py"
        script.write_text(COUNTING)
        done = subprocess.run(
            [python, str(script), json.dumps([str(model), RANK, kinds])],
            capture_output=True,
            text=True,
            check=False,
            cwd=room,
        )
    line = next((line for line in done.stdout.splitlines() if line.startswith("HELD")), None)
    if line is None:
        raise SystemExit(f"{model}: {done.stderr[-2000:]}")
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of an environment with vLLM")
    parser.add_argument("--models", default=",".join(MODELS))
    asked = parser.parse_args()
    python = str(Path(asked.python).absolute())
    print(f"{'model':8} {'kinds':60} {'counted':>10} {'vLLM, told':>10} {'not told':>10}")
    for name in asked.models.split(","):
        configuration, kind = MODELS[name]
        torch.manual_seed(0)
        model = kind(configuration(**SIZES))
        with tempfile.TemporaryDirectory() as place:
            model.bfloat16().save_pretrained(place)
            free = reserved(python, Path(place), None)
            for kinds in KINDS:
                shapes = {
                    called: tuple(module.weight.shape)
                    for called, module in model.named_modules()
                    if called.rpartition(".")[2] in kinds
                }
                counted = bytes_of(RANK, width_of(shapes))
                told = reserved(python, Path(place), target_modules(shapes))
                print(f"{name:8} {' '.join(kinds):60} {counted:>10,} {told:>10,} {free:>10,}", flush=True)


if __name__ == "__main__":
    main()
