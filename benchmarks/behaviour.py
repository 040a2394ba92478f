"""What calibration and distillation buy, on prompts that neither has seen.

    python benchmarks/behaviour.py LORA --base-model BASE --train TRAIN.jsonl --heldout HELDOUT.jsonl
        [--calibration ROWS.jsonl] [--budgets 0.25,0.125] [--transforms none,ke] [--minutes 10] [--out DIR]
        [--ways data-free,output,input,two-sided,local,all]

For each transform and budget: the data-free fit, calibrated in each metric, and distilled from the data-free fit with the local
or all parts trained for the given minutes (everything counted), each measured by `verify` on HELDOUT. Rows go to
OUT/behaviour.jsonl as they end, and what is there already is not made again. TRAIN and HELDOUT must not share rows.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bslora_convert import Recipe, Training, compress, verify

WAYS = ("data-free", "output", "input", "two-sided", "local", "all")
MEASURES = ("kl", "kl_p99", "base_kl", "retention", "agreement", "hidden_error")


def make(
    way: str, lora: Path, place: Path, transform: str, budget: float, options: argparse.Namespace
) -> dict[str, Any]:
    """One compact adapter."""
    fields: dict[str, Any] = {"transform": transform, "budget": budget}
    training = None
    if way != "data-free":
        fields["base_model"] = options.base_model
    if way in ("output", "input", "two-sided"):
        fields |= {"prompts": str(options.calibration or options.train), "metric": way}
    if way in ("local", "all"):
        fields |= {"finetune": str(options.train)}
        training = Training(train=way, max_minutes=options.minutes, max_steps=options.steps, epochs=3)
    return compress(lora, place, Recipe(**fields), training=training, overwrite=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, help="rows to calibrate on; those of --train where it is not given")
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--budgets", default="0.25,0.125")
    parser.add_argument("--transforms", default="none,ke")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path, default=Path("build/behaviour"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "behaviour.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    for budget in map(float, options.budgets.split(",")):
        for transform in options.transforms.split(","):
            for way in options.ways.split(","):
                key = {"adapter": options.lora.name, "transform": transform, "budget": budget, "way": way}
                if any(key.items() <= row.items() for row in rows):
                    continue
                place = options.out / f"{options.lora.name}-{transform}-{budget:g}-{way}"
                began = time.perf_counter()
                record = make(way, options.lora, place, transform, budget, options)
                seconds = time.perf_counter() - began
                found = verify(
                    place,
                    options.lora,
                    options.base_model,
                    prompts=options.heldout,
                    max_new_tokens=0,
                    limit=options.limit,
                )
                row = {
                    **key,
                    "seconds": seconds,
                    "weight_error": record["weight"]["relative_error"],
                    "nll": found["nll"],
                }
                row |= {name: found[name] for name in MEASURES}
                row |= {name: record[name] for name in ("evidence", "training") if name in record}
                rows.append(row)
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(f"{key} KL {row['kl']:.5f} in {seconds:.0f} s", flush=True)
    table = Table(title=f"measured on {options.heldout.name}")
    for column in (
        "adapter",
        "kept",
        "transform",
        "way",
        "KL",
        "base KL",
        "retention",
        "agreement",
        "NLL",
        "‖ΔW‖ error",
        "s",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        numbers = (f"{row['kl']:.5f}", f"{row['base_kl']:.3f}", f"{row['retention']:.2%}", f"{row['agreement']:.2%}")
        table.add_row(
            row["adapter"], f"{row['budget']:.1%}", row["transform"], row["way"], *numbers, f"{row['nll']['compact']:.4f}",
            f"{row['weight_error']:.3f}", f"{row['seconds']:.0f}",
        )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
