"""The trellis beside its rival: a uniform quantiser whose codes go through a perfect entropy coder.

    python benchmarks/entropy.py [COMPACT ...]

First table: the share of a normal number's energy that each loses at the same bits a number. The quantiser has equal steps, a
zone around zero of its own width, the mean of each step as its value, and as many bits as its codes have entropy; step and zone
are the best. The trellis is measured on vectors of 1,024 numbers, their beginnings counted.

COMPACT: directories that `compress --bytes` wrote. Second table: the entropy of the bytes of their codes, of 8 bits: what a coder
of single bytes could still save.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bslora_convert import load_compact
from bslora_convert.bslora.codes.trellis import TRELLIS_WIDTHS
from bslora_convert.coding.encode import encode

STEPS = 1 << 14  # of a quantiser to either side of zero, at most
LENGTH, VECTORS = 1024, 100
ZONES = np.linspace(0.4, 0.9, 26)  # half of the zone around zero, in steps


def quantised(step: float, zone: float) -> tuple[float, float]:
    """(entropy, share lost) of a normal number."""
    edges = torch.tensor(zone * step + step * np.arange(min(STEPS, int(12 / step) + 2)))
    edges = torch.cat([-edges.flip(0), edges])
    edges = torch.cat([edges.new_full((1,), -np.inf), edges, edges.new_full((1,), np.inf)])
    share = torch.special.ndtr(edges).diff()
    density = torch.exp(-edges.square() / 2) / (2 * np.pi) ** 0.5
    held = share > 1e-30
    share, mean = share[held], -density.diff()[held] / share[held]
    return -float(torch.special.xlogy(share, share).sum()) / float(np.log(2)), 1 - float((share * mean.square()).sum())


def at(bits: float, zone: float) -> float:
    """The share lost at so many bits of entropy."""
    low, high = 1e-3, 20.0
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if quantised(middle, zone)[0] > bits else (low, middle)
    return quantised(high, zone)[1]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compact", type=Path, nargs="*")
    options = parser.parse_args()
    table = Table()
    for column in ("bits", "limit", "trellis", "entropy-coded", "trellis, bits from the limit", "entropy-coded"):
        table.add_column(column, justify="right")
    numbers = torch.randn(VECTORS, LENGTH, generator=torch.Generator().manual_seed(0))
    for width in TRELLIS_WIDTHS:
        limit, lost = 4.0**-width, encode(numbers, [width] * VECTORS).decode() - numbers
        trellis = float(lost.square().sum() / numbers.square().sum())
        coded = min(at(width, zone) for zone in ZONES)
        gaps = (f"{np.log2(found / limit) / 2:.3f}" for found in (trellis, coded))
        table.add_row(str(width), *(f"{found:.6f}" for found in (limit, trellis, coded)), *gaps)
    Console().print(table)
    if options.compact:
        table = Table()
        for column in ("", "bytes of codes", "entropy of a byte"):
            table.add_column(column, justify="right")
        for path in options.compact:
            whole = torch.cat([t for name, t in load_compact(path).codes.items() if "_trellis_" in name])
            share = whole.int().bincount(minlength=256).double() / len(whole)
            bits = -float(torch.special.xlogy(share, share).sum()) / float(np.log(2))
            table.add_row(str(path), f"{len(whole):,}", f"{bits:.4f}")
        Console(width=120).print(table)


if __name__ == "__main__":
    main()
