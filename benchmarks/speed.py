"""What `compress` takes, beside reading the file and plain quantisers in the same run.

    python benchmarks/speed.py fixtures/smollm2-135m-math-r16 [--repeats 3] [--skip-large]

Each row is a fresh process with two threads, the whole of it: imports, reading, writing, the page. CPU seconds are user and
system time, the least of the repeats, since machines are shared; memory is the peak of the process.

  read and cast     every tensor of the file in float32
  int4, NF4         the tensors in blocks of 64, coded and saved (NF4 with double quantisation, `baselines/nf4.py`)
  compress          the default: codes, at most 10 % of weight error
  an eighth         `--transform none --bytes 0.125`

Beside the adapter that is named, one of rank 16 with the shapes of Llama-3-8B, its A as PEFT draws it from a seed and then
changed by a fifth, in bf16; and the same with A drawn otherwise, so that all of it is coded.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}  # fmt: skip
RANK, LAYERS, BLOCK, CHANGED = 16, 32, 64, 0.2
JOBS = ("read and cast", "int4", "NF4", "compress", "an eighth")


def write_large(directory: Path, known: bool) -> None:
    """An adapter of an 8B model. known: whether a seed gives its A back, but for what training changed."""
    import torch
    from safetensors.torch import save_file
    from torch import nn

    torch.manual_seed(42)
    numbers = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(LAYERS):
        for kind, (out, width) in SHAPES.items():
            a, b = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, out, bias=False)
            nn.init.kaiming_uniform_(a.weight, a=math.sqrt(5))
            drawn = a.weight.detach() if known else torch.randn(RANK, width, generator=numbers) / (3 * width) ** 0.5
            moved = torch.randn(RANK, width, generator=numbers) * CHANGED / (3 * width) ** 0.5
            decay = torch.arange(1, RANK + 1).float() ** -0.7
            name = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{name}.lora_A.weight"] = (drawn + moved).bfloat16()
            tensors[f"{name}.lora_B.weight"] = (0.05 * torch.randn(out, RANK, generator=numbers) * decay).bfloat16()
            del b
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [k.split(".")[1] for k in SHAPES],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def work(job: str, adapter: Path, place: Path) -> None:
    """One row, in this process."""
    import torch

    torch.set_num_threads(2)
    if job in ("compress", "an eighth"):
        from bslora_convert import Recipe, compress

        compress(adapter, place / "out", Recipe() if job == "compress" else Recipe(transform="none", bytes=0.125))
        return
    from safetensors.torch import load_file, save_file

    tensors = {name: tensor.float() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    if job == "read and cast":
        return
    from bslora_convert.baselines.blocks import rtn
    from bslora_convert.baselines.nf4 import NF4

    grid = rtn(4, BLOCK) if job == "int4" else NF4
    coded = {}
    for name, tensor in tensors.items():
        coded |= {f"{name}.{at}": part for at, part in enumerate(grid.encode(tensor).stored())}
    save_file(coded, place / "coded.safetensors")


def measured(job: str, adapter: Path, repeats: int) -> tuple[float, float, float, int]:
    """(CPU seconds, wall seconds, peak MB, bytes written) of the run that took least CPU."""
    runs = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as place:
            began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
            command = [sys.executable, __file__, str(adapter), "--job", job, "--place", place]
            peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            size = sum(file.stat().st_size for file in Path(place).rglob("*.safetensors"))
            runs.append((spent, time.perf_counter() - began, peak / 1024, size))
    return min(runs)


def main() -> None:
    """Prints a table for each adapter."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-large", action="store_true")
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.job:
        work(asked.job, asked.adapter, asked.place)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return
    with tempfile.TemporaryDirectory() as place:
        adapters = {asked.adapter.name: asked.adapter}
        if not asked.skip_large:
            for name, known in (("8B, A of a seed", True), ("8B, A unknown", False)):
                adapters[name] = Path(place) / name.replace(" ", "-")
                write_large(adapters[name], known)
        for name, adapter in adapters.items():
            size = (adapter / "adapter_model.safetensors").stat().st_size
            print(
                f"\n{name}, {size / 1e6:.1f} MB\n{'':14} {'CPU s':>7} {'wall s':>7} {'peak MB':>8} {'of the bytes':>13}"
            )
            for job in JOBS:
                cpu, wall, peak, written = measured(job, adapter, asked.repeats)
                share = f"{written / size:.1%}" if written else ""
                print(f"{job:14} {cpu:7.1f} {wall:7.1f} {peak:8.0f} {share:>13}", flush=True)


if __name__ == "__main__":
    main()
