"""What coding the codes once more would save: zstandard, and a perfect coder of single codes.

    pip install zstandard
    python benchmarks/entropy.py COMPACT [COMPACT ...]

COMPACT: directories that `compress --bytes` wrote. Shares of the codes' bytes that are left: zstandard at level 19 on them as
they are, on a byte for each code, and the entropy of single codes, each width by itself.
"""

import argparse
from pathlib import Path

import torch
import zstandard
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bslora_convert import load_compact
from bslora_convert.bslora.coding.packing import unpack


def squeezed(tensor: Tensor) -> int:
    """Bytes that zstandard makes of a tensor's."""
    return len(zstandard.ZstdCompressor(19).compress(tensor.contiguous().view(torch.uint8).numpy().tobytes()))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compact", type=Path, nargs="+")
    table = Table()
    for column in ("", "bytes", "zstandard", "a byte a code", "entropy"):
        table.add_column(column, justify="right")
    for path in parser.parse_args().compact:
        whole, packed, apart, entropy = 0, 0, 0, 0.0
        for name, tensor in load_compact(path).codes.items():
            whole, packed = whole + tensor.nbytes, packed + squeezed(tensor)
            if not name.startswith("bslora_codes_"):
                apart, entropy = apart + tensor.nbytes, entropy + tensor.nbytes
                continue
            codes = unpack(tensor, int(name.rpartition("_")[2]))
            share = codes.int().bincount().double() / len(codes)
            apart += squeezed(codes)
            entropy -= (
                float(torch.special.xlogy(share, share).sum()) / torch.log(torch.tensor(2.0)).item() * len(codes) / 8
            )
        table.add_row(str(path), f"{whole:,}", *(f"{part / whole:.3f}" for part in (packed, apart, entropy)))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
