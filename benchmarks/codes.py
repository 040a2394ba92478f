"""Codes beside every rival at as many bytes, least-squares and unbiased: the table of docs/precision.md.

    python benchmarks/codes.py LORA --base-model BASE --prompts ROWS.jsonl [--limit 60]
        [--budgets 0.5,0.25,0.125,0.0625,0.03125,0.015625] [--forms svd_adaptive,…] [--out build/codes]

Each form is fitted and measured as `compare` does; other quantisers twice, the second time with A's random initialisation known,
where it is found (`…_initial`). Forms that are of one size, the whole adapter in int8, int4 and NF4, stand at that size, with the
mixed code of as many bytes. Each row goes to OUT/codes.jsonl as it is made, and what is there already is not made again.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bslora_convert import compare
from bslora_convert.baselines import QUANTISED, QUANTISED_INITIAL, WHOLE, WHOLE_INITIAL
from bslora_convert.comparison.forms import SUFFIX

OURS = "svd_mixed"
BUDGETS = "0.5,0.25,0.125,0.0625,0.03125,0.015625"


def beside(forms: list[str]) -> list[str]:
    """The forms, each with its unbiased twin."""
    return [name for form in forms for name in (form, f"{form}{SUFFIX}")]


def sizes(lora: Path, budgets: list[float], forms: list[str]) -> Iterator[tuple[float, list[str]]]:
    """Each size with the forms that stand at it; what is of one size comes last."""
    for budget in budgets:
        yield budget, beside([OURS, *forms])
    for row in compare(lora, budgets=[1.0], forms=[*WHOLE, *WHOLE_INITIAL])["rows"]:
        if row["byte_ratio"] is not None:
            yield row["byte_ratio"], beside([OURS, row["form"]])


def shown(rows: list[dict[str, Any]]) -> Table:
    """The rows by size, and at each by KL."""
    table = Table()
    for column in (
        "adapter",
        "size",
        "form",
        "bytes",
        "lost",
        "gain",
        "KL",
        "retention",
        "same first choice",
        "KL / ours",
    ):
        table.add_column(column, justify="left" if column == "form" else "right")
    for adapter, budget in dict.fromkeys((row["adapter"], row["size"]) for row in rows):
        here = [row for row in rows if (row["adapter"], row["size"]) == (adapter, budget)]
        measured = sorted((row for row in here if row["functional"]), key=lambda row: row["functional"]["kl"])
        ours = next(row["functional"]["kl"] for row in measured if row["form"] == f"{OURS}{SUFFIX}")
        for row in measured:
            found = row["functional"]
            table.add_row(
                adapter, f"{budget:.2%}", row["form"], f"{row['byte_ratio']:.2%}", f"{row['relative_error'] ** 2:.3%}",
                f"{row['gain']:.3f}", f"{found['kl']:.6f}", f"{found['retention']:.3%}", f"{found['agreement']:.2%}",
                f"{found['kl'] / ours:.2f}",
            )  # fmt: skip
        for row in here:
            if row not in measured:
                table.add_row(adapter, f"{budget:.2%}", row["form"], "–")
        table.add_section()
    return table


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--budgets", default=BUDGETS)
    parser.add_argument("--forms", default=",".join(["svd_adaptive", *QUANTISED, *QUANTISED_INITIAL]))
    parser.add_argument("--out", type=Path, default=Path("build/codes"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / "codes.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    budgets = [float(budget) for budget in options.budgets.split(",")]
    about = {"adapter": options.lora.name, "prompts": options.prompts.name, "limit": options.limit}
    for size, forms in sizes(options.lora, budgets, options.forms.split(",")):
        here = {**about, "size": size}
        known = {row["form"] for row in rows if here.items() <= row.items()}
        for form in (form for form in forms if form not in known):
            found = compare(
                options.lora, budgets=[size], forms=[form], base_model=options.base_model, prompts=options.prompts,
                limit=options.limit,
            )  # fmt: skip
            (row,) = [{**row.to_dict(), **here} for row in found["rows"]]
            rows.append(row)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{options.lora.name} at {size:.2%}: {form}", flush=True)
    Console(width=160).print(shown([row for row in rows if about.items() <= row.items()]))


if __name__ == "__main__":
    main()
