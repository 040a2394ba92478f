"""A library of real adapters: trained where they are missing, converted by `batch`, every one measured by `verify`.

    python benchmarks/tenants.py ROWS --base-model BASE --out DIR [--steps 24] [--limit 24] [--recipes ke,bytes]

ROWS holds NAME-heldout.jsonl for each adapter and NAME-train.jsonl for those to be trained. Adapters that stand in
DIR/library/NAME are used as they are; the others are trained there with PEFT (ranks 4, 8 and 16 in turn, all seven kinds of
modules). Recipes: ke (`--transform ke --budget 0.4459`) and bytes (`--transform none --bytes 0.125`).
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from bslora_convert import Recipe, batch, verify
from bslora_convert.behaviour.model import load_base
from bslora_convert.behaviour.prompts import batches, encode, read_prompts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANKS = (4, 8, 16)
RECIPES = {
    "ke": Recipe(transform="ke", budget=0.4459),
    "bytes": Recipe(transform="none", bytes=0.125),
}


def train(base_model: str, base_name: str, rows: Path, rank: int, steps: int, out: Path) -> None:
    """Writes a LoRA trained on the rows' completions, eight a step; base_name: what its configuration calls the base."""
    base = load_base(base_model)
    examples = [encode(row, base.tokenizer, base.context, True) for row in read_prompts(rows)]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=6e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen = [examples[i % len(examples)] for i in range(8 * step, 8 * step + 8)]
        rows_ = next(batches(chosen, len(chosen), base.pad))
        labels = rows_.ids.roll(-1, 1).masked_fill(~rows_.predicts, -100).roll(1, 1)
        loss = model(input_ids=rows_.ids, attention_mask=rows_.mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        print(f"{out.name}: step {step + 1} of {steps}, loss {float(loss):.3f}", flush=True)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.bfloat16().save_pretrained(out)


def size(adapter: Path) -> int:
    """Bytes of an adapter's weights."""
    return (adapter / "adapter_model.safetensors").stat().st_size


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--base-name", help="what the adapters call their base")
    parser.add_argument("--out", type=Path, default=Path("build/tenants"))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--recipes", default=",".join(RECIPES))
    options = parser.parse_args()
    library, log = options.out / "library", options.out / "tenants.jsonl"
    names = sorted(path.name.removesuffix("-heldout.jsonl") for path in options.rows.glob("*-heldout.jsonl"))
    for name, rank in zip(names, itertools.cycle(RANKS)):
        if not (library / name).exists():
            train(
                options.base_model,
                options.base_name or options.base_model,
                options.rows / f"{name}-train.jsonl",
                rank,
                options.steps,
                library / name,
            )
    rows: list[dict[str, Any]] = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    table = Table(title=f"{len(names)} adapters, {options.limit} rows each, held out")
    for column in ("", "adapter", "bytes", "of the source", "‖ΔW‖ error", "KL", "base KL", "retention", "same choice"):
        table.add_column(column, justify="right")
    for recipe in options.recipes.split(","):
        out = options.out / recipe
        summary = batch(library, out, RECIPES[recipe])
        print(json.dumps({"recipe": recipe, "ok": summary["ok"]}), flush=True)
        for name in names:
            if not any((row["recipe"], row["name"]) == (recipe, name) for row in rows):
                found = verify(
                    out / name, library / name, options.base_model,
                    prompts=options.rows / f"{name}-heldout.jsonl", limit=options.limit, max_new_tokens=0,
                )  # fmt: skip
                rows.append(
                    {
                        "recipe": recipe,
                        "name": name,
                        "bytes": size(out / name),
                        "source_bytes": size(library / name),
                        "error": json.loads((out / name / "fidelity.json").read_text())["weight"]["relative_error"],
                        **{key: found[key] for key in ("kl", "base_kl", "retention", "agreement")},
                    }
                )
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
            row = next(row for row in rows if (row["recipe"], row["name"]) == (recipe, name))
            table.add_row(
                recipe, name, f"{row['bytes']:,}", f"{row['bytes'] / row['source_bytes']:.1%}", f"{row['error']:.3f}",
                f"{row['kl']:.5f}", f"{row['base_kl']:.3f}", f"{row['retention']:.2%}", f"{row['agreement']:.1%}",
            )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
