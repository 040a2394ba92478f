"""`batch` on generated libraries: throughput by workers, and memory as the library grows.

    python benchmarks/library.py [--counts 10,100,1000] [--workers 1,2] [--layers 8]

Adapters have the widths of a small model (hidden 256, q v up down, rank 8, bf16), `--transform none --budget 0.5`, no pages. Each
row is a fresh process; its peak is that of the whole process tree, sampled ten times a second. Ratios are within this run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file

KINDS = {
    "self_attn.q_proj": (256, 256),
    "self_attn.v_proj": (64, 256),
    "mlp.up_proj": (704, 256),
    "mlp.down_proj": (256, 704),
}
RANK = 8


def write_lora(place: Path, layers: int, seed: int) -> None:
    """A random LoRA whose singular values fall off."""
    place.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    scale = 0.8 ** torch.arange(RANK)
    tensors = {}
    for layer in range(layers):
        for kind, (out, width) in KINDS.items():
            name = f"base_model.model.model.layers.{layer}.{kind}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, width, generator=generator).bfloat16()
            tensors[f"{name}.lora_B.weight"] = (torch.randn(out, RANK, generator=generator) * scale).bfloat16()
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [kind.rpartition(".")[2] for kind in KINDS]
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (place / "adapter_config.json").write_text(json.dumps(config))


def run(library: Path, out: Path, workers: int) -> tuple[float, float, int]:
    """(Adapters a second, wall seconds, peak bytes of the process tree) of one run."""
    command = [
        sys.executable, "-m", "bslora_convert", "batch", str(library), str(out), "--workers", str(workers), "--json",
        "--transform", "none", "--budget", "0.5", "--no-report-html",
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    peak = 0
    while process.poll() is None:
        try:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(one.memory_info().rss for one in tree))
        except psutil.Error:
            pass
        time.sleep(0.1)
    seconds = time.perf_counter() - began
    assert process.stdout is not None
    summary = json.loads(process.stdout.read())
    shutil.rmtree(out)
    return summary["adapters_per_second"], seconds, peak


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", default="10,100,1000")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--layers", type=int, default=8)
    options = parser.parse_args()
    counts = [int(count) for count in options.counts.split(",")]
    workers = [int(count) for count in options.workers.split(",")]
    table = Table(title=f"{options.layers} layers, rank {RANK}, {os.cpu_count()} cores")
    for column in (
        "adapters",
        "workers",
        "adapters/s",
        f"x {workers[0]} worker",
        "wall s",
        "peak MB",
        f"x {counts[0]} adapters",
    ):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as place:
        for number in range(max(counts)):
            write_lora(Path(place) / "all" / f"{number:04d}", options.layers, number)
        first_peak: dict[int, int] = {}
        for count in counts:
            library = Path(place) / f"first-{count}"
            library.mkdir()
            for number in range(count):
                shutil.copytree(Path(place) / "all" / f"{number:04d}", library / f"{number:04d}")
            slowest = 0.0
            for number in workers:
                rate, seconds, peak = run(library, Path(place) / "out", number)
                slowest = slowest or rate
                first_peak.setdefault(number, peak)
                table.add_row(
                    str(count), str(number), f"{rate:.1f}", f"{rate / slowest:.2f}", f"{seconds:.1f}", f"{peak / 1e6:.0f}",
                    f"{peak / first_peak[number]:.2f}",
                )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
