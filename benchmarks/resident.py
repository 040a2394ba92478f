"""Resident memory of many adapters on one base model in PEFT, compact against LoRA; the paper's Figure 6 question.

    python benchmarks/resident.py [--counts 1,10,100,300] [--budgets 0.4459,0.125] [--layers 6] [--gib 8]

Each number is the growth of a fresh process's resident set from the loaded base to the last loaded adapter (everything counts:
tensors, Python's objects, what loading leaves behind). The base has SmolLM2-135M's widths and random weights, the LoRA rank 16 on
all seven linear layers, adapters are held as PEFT holds them, in float32. "fit" is how many adapters G GiB hold beside the base,
from the bytes per adapter at the largest count.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

HIDDEN, INNER, HEADS, KV = 576, 1536, 9, 3
RANK = 16
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 3, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 3, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def write_lora(directory: Path, layers: int) -> None:
    """A random LoRA."""
    import torch
    from safetensors.torch import save_file

    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(layers):
        for kind, (out, width) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, width, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, RANK, generator=generator)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [kind.rpartition(".")[2] for kind in SHAPES]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (directory / "adapter_config.json").write_text(json.dumps(config))


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def load(directory: Path, count: int, layers: int) -> int:
    """Growth of the resident set by `count` adapters."""
    import gc

    import torch
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    import bslora_convert.peft  # noqa: F401

    config = LlamaConfig(
        vocab_size=256, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    with torch.inference_mode():
        base(input_ids=torch.arange(8)[None])
    gc.collect()
    before = resident()
    model = PeftModel.from_pretrained(base, str(directory), adapter_name="0", low_cpu_mem_usage=True)
    for number in range(1, count):
        model.load_adapter(str(directory), str(number), low_cpu_mem_usage=True)
    gc.collect()
    return resident() - before


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="1,10,100,300")
    parser.add_argument("--budgets", default="0.4459,0.125")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(load(Path(options.load[0]), int(options.load[1]), options.layers))
        return

    from rich.console import Console
    from rich.table import Table

    from bslora_convert import Recipe, compress

    counts = [int(count) for count in options.counts.split(",")]
    with tempfile.TemporaryDirectory() as place:
        write_lora(Path(place) / "lora", options.layers)
        shares = {"lora": 1.0}
        for budget in options.budgets.split(","):
            name = f"ke {budget}"
            record = compress(Path(place) / "lora", Path(place) / name, Recipe(budget=float(budget)), report_html=False)
            shares[name] = record["compact"]["parameter_ratio"]
        found: dict[str, list[int]] = {}
        for name in shares:
            for count in counts:
                command = [
                    sys.executable,
                    __file__,
                    "--layers",
                    str(options.layers),
                    "--load",
                    f"{place}/{name}",
                    str(count),
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found.setdefault(name, []).append(int(done.stdout.split()[-1]))
    table = Table(title=f"{options.layers} layers of SmolLM2-135M's widths: resident MB (share of LoRA's)")
    for column in ("", "parameters kept", *(str(count) for count in counts), f"fit in {options.gib:g} GiB"):
        table.add_column(column, justify="right")
    for name, sizes in found.items():
        cells = [f"{size / 1e6:.1f} ({size / whole:.3f})" for size, whole in zip(sizes, found["lora"], strict=True)]
        fit = options.gib * 2**30 / (sizes[-1] / counts[-1])
        table.add_row(name, f"{shares[name]:.3f}", *cells, f"{fit:,.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
