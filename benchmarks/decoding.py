"""Reading an adapter of 8B shapes in codes beside reading the same one in 16 bits.

    python benchmarks/decoding.py [--rank 16] [--repeats 5]

A random adapter with the shapes of Llama-3-8B (32 layers, seven kinds), a quarter of its bytes in codes of 2, 3, 4 and 8 bits.
Rows take turns; the fastest run of each counts. "16 bits" maps the file and looks for numbers that are not finite, as every
reader does; "copied" puts the numbers into memory of their own, as decoding does and a server must. "From disk" drops the file
from the page cache first.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from bslora_convert.bslora.codes.file import check_codes, decoded, to_file
from bslora_convert.coding.encode import encode
from bslora_convert.files.tensorfile import check_finite

KINDS = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
LAYERS = 32


def drop(path: Path) -> None:
    """Takes a file out of the page cache."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(file)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    rank, generator = options.rank, torch.Generator().manual_seed(0)
    widths = sorted(([8, 4, 4, 4, 4, 3, 3, 2] * rank)[:rank], reverse=True)
    one = {
        side: encode(torch.randn(rank, side, generator=generator), widths).coded
        for side in {s for k in KINDS for s in k}
    }
    shapes, coded, plain = [], {}, {}
    for layer in range(LAYERS):
        for kind, (out, width) in enumerate(KINDS):
            for side, length in (("A", width), ("B", out)):
                key = f"model.layers.{layer}.{kind}.bslora_local_{side}"
                shapes.append((key, (rank, length) if side == "A" else (length, rank)))
                coded[key] = one[length]
                plain[key] = torch.randn(shapes[-1][1], generator=generator).bfloat16()
    with tempfile.TemporaryDirectory() as place:
        codes, floats = Path(place, "codes"), Path(place, "floats")
        save_file(to_file(coded), codes)
        save_file(plain, floats)

        def read_floats() -> None:
            for key, tensor in load_file(floats).items():
                check_finite(floats, key, tensor)

        def copy_floats() -> dict[str, torch.Tensor]:
            found = {}
            for key, tensor in load_file(floats).items():
                check_finite(floats, key, tensor)
                found[key] = tensor.clone()
            return found

        def read_codes(dtype: torch.dtype) -> dict[str, torch.Tensor]:
            file = load_file(codes)
            check_codes(file, shapes, dtype, codes)
            return decoded(file, shapes, dtype)

        runs: dict[str, tuple[Path, bool, Callable[[], Any]]] = {
            "16 bits": (floats, True, read_floats),
            "16 bits, copied": (floats, True, copy_floats),
            "codes, to bfloat16": (codes, True, lambda: read_codes(torch.bfloat16)),
            "codes, to float32": (codes, True, lambda: read_codes(torch.float32)),
            "16 bits, copied, from disk": (floats, False, copy_floats),
            "codes, to bfloat16, from disk": (codes, False, lambda: read_codes(torch.bfloat16)),
        }
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(options.repeats):
            for name, (path, cached, run) in runs.items():
                if not cached:
                    drop(path)
                began = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - began)
        table = Table(
            title=f"rank {rank}, {floats.stat().st_size / 1e6:.0f} MB in 16 bits, {codes.stat().st_size / 1e6:.0f} MB in codes"
        )
    for column in ("", "seconds", "x 16 bits"):
        table.add_column(column, justify="right")
    for name, seconds in best.items():
        table.add_row(name, f"{seconds:.3f}", f"{seconds / best['16 bits']:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
