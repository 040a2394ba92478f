"""Tokens a second of distillation beside plain LoRA training in PEFT with the same rank, in one run.

    python benchmarks/training.py LORA --base-model BASE --prompts ROWS.jsonl [--rank 4] [--steps 4]

Rows: PEFT LoRA of that rank on the rows' completions (forward and backward), distillation of `none` at that rank and of `ke` with
the same local rank (the teacher's forward besides). Each step of all of them is taken in turns on the same batch; the best step
of each counts. Distillation does at least a third more work a token: one more forward pass.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from bslora_convert import Recipe, Training, compress, load_compact
from bslora_convert.behaviour.adapter import read_adapter
from bslora_convert.behaviour.distill import Trainer
from bslora_convert.behaviour.prompts import Example, Prompts, batches
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.training_rows import TrainingRows, TrainingRun
from bslora_convert.conversion.request import Converted

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_step(base: str, rank: int, pad: int) -> Callable[[Sequence[Example]], None]:
    """One step of plain LoRA training."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=rank, target_modules=TARGETS)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(rows: Sequence[Example]) -> None:
        batch = next(batches(rows, len(rows), pad))
        labels = batch.ids.roll(-1, 1).masked_fill(~batch.predicts, -100).roll(1, 1)
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--place", type=Path, default=Path("build/training"))
    options = parser.parse_args()
    session = BaseModelSession(read_adapter(options.lora), options.base_model)
    examples = session.encode(Prompts.read(options.prompts, 8 * options.steps)).examples
    steps: dict[str, Callable[[Sequence[Example]], Any]] = {
        f"LoRA {options.rank} in PEFT": lora_step(options.base_model, options.rank, session.base.pad)
    }
    for name, ranks in (("none", (options.rank, 0, 0)), ("ke", (options.rank, 4, 16))):
        compress(options.lora, options.place / name, Recipe(transform=name, ranks=ranks), overwrite=True)
        form = load_compact(options.place / name).form
        start, rows_of = Converted(form), TrainingRows(examples, examples[:1])
        run = Trainer(session, start, rows_of, TrainingRun(Training(), options.place, 0.0), None)
        steps[f"distil {name}"] = lambda rows, run=run: run.one_step(iter([rows]))
    found = dict.fromkeys(steps, 0.0)
    for start in range(0, len(examples), 8):
        rows = examples[start : start + 8]
        tokens = sum(len(example.ids) for example in rows)
        for name, step in steps.items():
            began = time.perf_counter()
            step(rows)
            found[name] = max(found[name], tokens / (time.perf_counter() - began))
    first = next(iter(found))
    table = Table(title=f"{torch.get_num_threads()} threads, float32, batches of 8")
    for column in ("", "tokens/s", f"/ {first}"):
        table.add_column(column, justify="right")
    for name, speed in found.items():
        table.add_row(name, f"{speed:.0f}", f"{speed / found[first]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
