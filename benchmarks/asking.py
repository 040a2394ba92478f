"""What `--min-retention` finds, beside a grid of `--bytes`, on rows that neither has seen.

    python benchmarks/asking.py LORA --base-model BASE --prompts PROMPTS.jsonl --heldout HELDOUT.jsonl
        [--aims 0.99,0.999] [--grid 0.03,0.04,0.05,0.06,0.08,0.1,0.12] [--transform none] [--out DIR]

Each result is measured by `verify` on HELDOUT, which must not share rows with PROMPTS. Rows go to OUT/asking.jsonl as they end,
and what is there already is not made again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bslora_convert import Recipe, compress, verify


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--aims", default="0.99,0.999")
    parser.add_argument("--grid", default="0.03,0.04,0.05,0.06,0.08,0.1,0.12")
    parser.add_argument("--transform", default="none")
    parser.add_argument("--out", type=Path, default=Path("build/asking"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "asking.jsonl"
    known = {row["asked"]: row for row in map(json.loads, log.read_text().splitlines())} if log.is_file() else {}
    on_base: dict[str, Any] = {"base_model": options.base_model, "prompts": str(options.prompts)}
    asked = {f"--min-retention {aim}": {"min_retention": float(aim), **on_base} for aim in options.aims.split(",")}
    asked |= {f"--bytes {share}": {"bytes": float(share)} for share in options.grid.split(",")}
    for number, (words, fields) in enumerate(asked.items()):
        if words not in known:
            began, place = time.process_time(), options.out / str(number)
            record = compress(options.lora, place, Recipe(transform=options.transform, **fields), overwrite=True)
            spent = time.process_time() - began
            found = verify(place, base_model=options.base_model, prompts=options.heldout, max_new_tokens=0)
            steps = len(record["aim"]["path"])
            known[words] = {"asked": words, "byte_ratio": record["compact"]["byte_ratio"], "steps": steps, "seconds": spent,
                            **{name: found[name] for name in ("kl", "retention", "retention_ci95", "agreement")}}  # fmt: skip
            with log.open("a") as file:
                file.write(json.dumps(known[words]) + "\n")
    table = Table()
    for column in ("asked", "bytes", "sizes tried", "CPU s", "KL", "retention", "95 %", "same first choice"):
        table.add_column(column, justify="right")
    for words in asked:
        row = known[words]
        low, high = row["retention_ci95"]
        table.add_row(
            words, f"{row['byte_ratio']:.2%}", str(row["steps"] or ""), f"{row['seconds']:.0f}", f"{row['kl']:.5f}",
            f"{row['retention']:.3%}", f"{low:.2%} to {high:.2%}", f"{row['agreement']:.1%}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
