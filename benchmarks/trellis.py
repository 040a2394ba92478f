"""The tables of the trellis code, trained anew, what each width loses of normal numbers, and the CPU time of its search.

    python benchmarks/trellis.py [--rounds 30] [--vectors 1600] [--out FILE]

Each width begins with normal quantiles in a random order, wider than the numbers by SPREAD where bits are many, and is
trained by the generalised Lloyd step: vectors of 1,024 normal numbers are encoded, and every entry becomes the mean of what it
stood for. The table that is printed is measured on other
vectors, at the scale of least error. Entries are whole multiples of 1/4096; --out writes them as the package holds them
(`bslora/codes/trellis.safetensors`).
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from safetensors.torch import save_file

from bslora_convert.bslora.codes.trellis import STATES, STEPS, TRELLIS_WIDTHS, windows_of
from bslora_convert.coding.viterbi import paths

LENGTH, REPEATS = 1024, 5
SPREAD = {1: 1.0, 2: 1.0, 3: 1.0, 4: 1.05, 5: 1.1, 6: 1.15, 7: 1.25, 8: 1.3}


def encoded(x: np.ndarray, table: np.ndarray, width: int) -> np.ndarray:
    """Windows (n, L) of the best paths; the table is indexed as files are read."""
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda rows: paths(rows, table, width), np.array_split(x, 8)))
    return windows_of(torch.from_numpy(np.concatenate(parts)), width).numpy()


def trained(width: int, rounds: int, x: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The table of a width, float32, whole multiples of 1/STEPS."""
    quantiles = np.array([NormalDist().inv_cdf((i + 0.5) / STATES) for i in range(STATES)], dtype=np.float32)
    table = quantiles[order] * np.float32(SPREAD[width])
    for _ in range(rounds):
        windows = encoded(x, table, width)
        count = np.bincount(windows.ravel(), minlength=STATES)
        total = np.bincount(windows.ravel(), weights=x.ravel().astype(float), minlength=STATES)
        table = np.where(count > 0, total / np.maximum(count, 1), table).astype(np.float32)
    rounded: np.ndarray = (np.round(table * STEPS) / STEPS).astype(np.float32)
    return rounded


def timed(x: np.ndarray, table: np.ndarray, width: int) -> float:
    """CPU seconds of the search alone, on one core."""
    began = time.process_time()
    paths(x, table, width)
    return time.process_time() - began


def main() -> None:
    """Prints the shares lost and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--vectors", type=int, default=1600)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    random = np.random.default_rng(0)
    tables = []
    for width in TRELLIS_WIDTHS:
        x = random.standard_normal((options.vectors, LENGTH)).astype(np.float32)
        table = trained(width, options.rounds, x, random.permutation(STATES))
        fresh = random.standard_normal((60, LENGTH)).astype(np.float32)
        windows = encoded(fresh, table, width)  # which compiles the search, or reads it
        spent = min(timed(fresh, table, width) for _ in range(REPEATS)) / fresh.size
        y = table[windows]
        lost = 1 - float((fresh * y).sum()) ** 2 / float((y * y).sum()) / float((fresh * fresh).sum())
        print(f"{width} bits: {lost:.6f} lost, limit {4.0**-width:.6f}; {1e6 * spent:.2f} µs a number", flush=True)
        tables.append(torch.from_numpy(np.round(table * STEPS).astype(np.int16)))
    if options.out:
        save_file({"tables": torch.stack(tables)}, options.out)


if __name__ == "__main__":
    main()
