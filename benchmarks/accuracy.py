"""Task accuracy of the base, an original adapter and compact versions of it, the same items for all, through lm-eval.

    python benchmarks/accuracy.py LORA --base-model BASE --compact DIR [--compact DIR ...] --tasks TASK,TASK
        --task-data DIR [--limit 100] [--batch-size 16] [--out build/accuracy.jsonl]

Every item's score goes to OUT, a row for each task and adapter as it ends; what is there already is not measured again. The
interval is the paired bootstrap's, of compact − original over items.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bslora_convert.behaviour.adapter import read_adapter
from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.harness import evaluate, paired_interval
from bslora_convert.behaviour.model import BaseModel, load_base


def state_of(base: BaseModel, path: Path | None) -> Any:
    """What is active on the base: an adapter, or nothing."""
    if path is None:
        return nullcontext()
    adapter = read_adapter(path)
    return Attached(base.model, adapter.form, adapter.carried, path, enabled=False)


def said(phase: str, /, done: int = 0, total: int = 0, words: str = "") -> None:
    print(phase, words)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--compact", type=Path, action="append", required=True)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--task-data", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("build/accuracy.jsonl"))
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    tasks = options.tasks.split(",")
    names = {
        f"base of {options.lora.name}": None,
        options.lora.name: options.lora,
        **{p.name: p for p in options.compact},
    }
    base = load_base(options.base_model)
    for name, path in names.items():
        missing = [task for task in tasks if not any((row["name"], row["task"]) == (name, task) for row in rows)]
        if not missing:
            continue
        state = state_of(base, path)
        for task in missing:
            scores = evaluate(
                base, {name: state}, [task], limit=options.limit, batch_size=options.batch_size, include_path=None,
                task_data=options.task_data, chat_template=True, seed=0, progress=said,
            )  # fmt: skip
            rows.append({"name": name, "task": task, "scores": scores[task].items[name].tolist()})
            with options.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
        if path is not None:
            state.remove()
    table = Table(title=f"{options.lora.name}, {options.limit} items a task")
    for column in ("", *tasks):
        table.add_column(column, justify="right")
    for name in names:
        cells = []
        for task in tasks:
            own, original = (
                next(row["scores"] for row in rows if (row["name"], row["task"]) == (wanted, task))
                for wanted in (name, options.lora.name)
            )
            low, high = paired_interval(own, original)
            cells.append(f"{sum(own) / len(own):.3f} [{low:+.3f}, {high:+.3f}]")
        table.add_row(name, *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
