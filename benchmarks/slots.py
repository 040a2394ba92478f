"""An adapter of a large rank in a server's smaller slot: the table of docs/serving.md.

    python benchmarks/slots.py BASE --prompts ROWS.jsonl --heldout HELDOUT.jsonl [--rank 64] [--slot 16] [--train 60] [--steps 24]
        [--bytes 0.0625] [--out build/slots]

Trains a LoRA of --rank on the rows with PEFT (all seven kinds, alpha twice the rank, AdamW at 6e-4, half a cosine, batches of 8)
and brings it to --slot with `compress --max-rank`: in 16 bits with least error (the truncated SVD), unbiased, and distilled on
the same rows, and in codes of that share of its bytes. Each is measured on the rows that were held out. What is in OUT is not
made again. A quarter of an hour of CPU time for each distillation, and as long for the training.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

from bslora_convert import Recipe, Training, compress, expand, verify
from bslora_convert.behaviour.model import load_base
from bslora_convert.behaviour.prompts import Example, batches, encode, read_prompts

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH = 8


def train(options: argparse.Namespace, place: Path) -> None:
    """Writes the adapter."""
    torch.manual_seed(0)
    base = load_base(options.base, "cpu")
    rows = [encode(row, base.tokenizer, base.context, True) for row in read_prompts(options.prompts)]
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=TARGETS, task_type="CAUSAL_LM")
    if len(rows) < BATCH:
        raise SystemExit(f"{options.prompts}: {BATCH} rows are needed at least")
    tuned = get_peft_model(base.model, config).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=6e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / options.train))
    )
    for step, some in zip(range(options.train), _batches(rows), strict=False):
        batch = next(batches(some, BATCH, base.pad))
        labels = batch.ids.roll(-1, 1).masked_fill(~batch.predicts, -100).roll(1, 1)
        loss = tuned(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"training {step + 1}/{options.train}: {float(loss.detach()):.3f}", flush=True)
    tuned.to(torch.bfloat16).save_pretrained(place)


def _batches(rows: Sequence[Example]) -> Iterator[list[Example]]:
    draw = torch.Generator().manual_seed(0)
    while True:
        order = torch.randperm(len(rows), generator=draw).tolist()
        yield from ([rows[at] for at in order[k : k + BATCH]] for k in range(0, len(rows) - BATCH + 1, BATCH))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--slot", type=int, default=16)
    parser.add_argument("--train", type=int, default=60)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--bytes", type=float, default=0.0625)
    parser.add_argument("--out", type=Path, default=Path("build/slots"))
    options = parser.parse_args()
    lora = options.out / f"lora-{options.rank}-{options.train}"
    if not (lora / "adapter_config.json").is_file():
        train(options, lora)
    floats = {"transform": "none", "max_rank": options.slot, "budget": options.slot / options.rank}
    codes = {"transform": "none", "max_rank": options.slot, "bytes": options.bytes}
    distilled = {"base_model": options.base, "finetune": options.prompts}
    forms = {
        "16 bits, least squares": Recipe(gain="least-squares", **floats),
        "16 bits": Recipe(**floats),
        "16 bits, distilled": Recipe(**floats, **distilled),
        f"codes, {options.bytes:.2%} of the bytes": Recipe(**codes),
        f"codes, {options.bytes:.2%} of the bytes, distilled": Recipe(**codes, **distilled),
    }
    log = options.out / "slots.jsonl"
    asked = {name: value for name, value in sorted(vars(options).items()) if name != "out"}
    asked |= {"prompts": Path(options.prompts).name, "heldout": options.heldout.name, "base": Path(options.base).name}
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    known = {row["form"]: row for row in rows if row["asked"] == asked}
    for number, (name, recipe) in enumerate(forms.items()):
        if name in known:
            continue
        place, training = options.out / str(number), Training(max_steps=options.steps) if "distilled" in name else None
        record = compress(lora, place, recipe, training=training, overwrite=True)
        served = expand(place, options.out / f"{number}-served", engine="vllm", overwrite=True)
        found = verify(place, reference=lora, base_model=options.base, prompts=options.heldout, max_new_tokens=0)
        known[name] = {
            "form": name, "asked": asked, "slot": served["served"]["max_lora_rank"],
            **{key: record["compact"][key] for key in ("bytes", "byte_ratio")},
            **{key: found[key] for key in ("kl", "base_kl", "retention", "retention_ci95", "agreement", "nll")},
        }  # fmt: skip
        with log.open("a") as file:
            file.write(json.dumps(known[name]) + "\n")
        print(known[name], flush=True)
    table = Table(title=f"rank {options.rank} in a slot of {options.slot}")
    for column in ("form", "bytes", "share", "slot", "KL", "retention", "95 %", "same first choice"):
        table.add_column(column, justify="left" if column == "form" else "right")
    for name in forms:
        row = known[name]
        low, high = row["retention_ci95"]
        table.add_row(name, f"{row['bytes']:,}", f"{row['byte_ratio']:.2%}", str(row["slot"]), f"{row['kl']:.5f}",
                      f"{row['retention']:.2%}", f"{low:.2%} to {high:.2%}", f"{row['agreement']:.1%}")  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
