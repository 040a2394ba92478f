"""`compress` on an adapter with the shapes of an 8B model, beside its peers in the same run.

    python benchmarks/eight_billion.py [--ranks 16,64] [--layers 32] [--repeats 3] [--skip-dense]

Rows, each in a fresh process (the fastest of the repeats, since machines are shared):
  read and cast    reading the file and casting every tensor to float32: the least that any converter does
  none, ke         `compress` end to end: read, hash, fit, write, read back, measure, fidelity.json and model card
  ke + report      the same with report.html
  none, a quarter  `--transform none --bytes 0.25`: in codes
  dense SVD        torch.linalg.svd of B·A, thin (the arithmetic of PEFT's convert_to_lora) and full (kohya's resize), measured on
                   one k_proj and scaled to all modules by the operation count out · in · min(out, in)

Peak memory is the process's high-water mark above what importing torch and the package takes. 32 layers, q k v o gate up down,
bf16, grouped-query attention: 168 million parameters at rank 64. Linearity: seconds against the same with half the layers.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SHAPES = {
    "self_attn.q_proj": (4096, 4096),
    "self_attn.k_proj": (1024, 4096),
    "self_attn.v_proj": (1024, 4096),
    "self_attn.o_proj": (4096, 4096),
    "mlp.gate_proj": (14336, 4096),
    "mlp.up_proj": (14336, 4096),
    "mlp.down_proj": (4096, 14336),
}

CODED, BUDGET = "none, a quarter", 0.4459  # of the parameters, in floats


def write_adapter(directory: Path, rank: int, layers: int) -> None:
    """A random adapter whose singular values fall off as trained ones do."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    decay = torch.arange(1, rank + 1).float() ** -0.7
    tensors = {}
    for layer in range(layers):
        for kind, (out, width) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{kind}"
            a = torch.randn(rank, width, generator=generator) * decay[:, None] / width**0.5
            tensors[f"{name}.lora_A.weight"] = a.bfloat16()
            tensors[f"{name}.lora_B.weight"] = (0.05 * torch.randn(out, rank, generator=generator)).bfloat16()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [k.split(".")[1] for k in SHAPES],
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def measure(job: str, directory: Path) -> dict[str, float]:
    """Runs one row in this process: seconds and peak bytes above the imports."""
    import resource
    import time

    import torch
    from safetensors.torch import load_file

    import bslora_convert.report  # noqa: F401  matplotlib and Jinja are imports, not work
    from bslora_convert.recipe.recipe import Recipe
    from bslora_convert.verbs.compress import compress

    def peak() -> int:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    torch.linalg.eigh(torch.eye(4))  # loads LAPACK
    before = peak()
    began = time.perf_counter()
    if job == "read and cast":
        held = {key: tensor.float() for key, tensor in load_file(directory / "adapter_model.safetensors").items()}
        assert held
    elif job.startswith("dense"):
        out, width = SHAPES["self_attn.k_proj"]
        delta = torch.randn(out, 64) @ torch.randn(64, width)
        began = time.perf_counter()
        torch.linalg.svd(delta, full_matrices="full" in job)
    else:
        with tempfile.TemporaryDirectory() as place:
            transform, _, page = job.partition(" + ")
            recipe = (
                Recipe(transform="none", bytes=0.25) if job == CODED else Recipe(transform=transform, budget=BUDGET)
            )
            compress(directory, Path(place) / "out", recipe, report_html=page == "report")
    return {"seconds": time.perf_counter() - began, "peak": peak() - before}


def best(job: str, directory: Path, repeats: int) -> dict[str, float]:
    """The fastest of several fresh processes."""
    runs = []
    for _ in range(repeats):
        command = [sys.executable, __file__, "--job", job, "--adapter", str(directory)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=dict(os.environ)).stdout
        runs.append(json.loads(output))
    return min(runs, key=lambda run: run["seconds"])


def main() -> None:
    """Prints one table for each rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="16,64")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--skip-dense", action="store_true")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    parser.add_argument("--adapter", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(options.job, options.adapter)))
        return
    dense = {} if options.skip_dense else {job: best(job, Path(), 1) for job in ("dense thin", "dense full")}
    out, width = SHAPES["self_attn.k_proj"]
    work = sum(o * w * min(o, w) for o, w in SHAPES.values()) * options.layers / (out * width * min(out, width))
    for rank in map(int, options.ranks.split(",")):
        with tempfile.TemporaryDirectory() as place:
            whole, half = Path(place) / "whole", Path(place) / "half"
            write_adapter(whole, rank, options.layers)
            write_adapter(half, rank, options.layers // 2)
            size = (whole / "adapter_model.safetensors").stat().st_size
            print(f"\nrank {rank}, {options.layers} layers, {size / 1e6:.0f} MB")
            print(f"{'':16}{'seconds':>9}{'x read+cast':>13}{'peak / file':>13}{'x half the layers':>19}")
            base = best("read and cast", whole, options.repeats)
            for job in ("read and cast", "none", "ke", "ke + report", CODED):
                run = base if job == "read and cast" else best(job, whole, options.repeats)
                shorter = best(job, half, options.repeats)
                print(
                    f"{job:16}{run['seconds']:9.2f}{run['seconds'] / base['seconds']:13.1f}{run['peak'] / size:13.2f}"
                    f"{run['seconds'] / shorter['seconds']:19.2f}",
                    flush=True,
                )
                if job == "none":
                    none = run["seconds"]
            for job, run in dense.items():
                seconds = run["seconds"] * work
                print(
                    f"{job + ' SVD':16}{seconds:9.0f}{seconds / base['seconds']:13.0f}   ({seconds / none:,.0f} x none)"
                )


if __name__ == "__main__":
    main()
