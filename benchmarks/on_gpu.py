"""A base model of 8 billion parameters on one GPU: what evidence, distillation, proof and adapters in memory cost there.

    python benchmarks/on_gpu.py [--layers 32] [--rank 16] [--rows 32] [--steps 12] [--out build/on-gpu]

Llama-3-8B's shapes with random weights in bfloat16 (16 GB are written to OUT once), the tokenizer of fixtures/tiny, the rows of
fixtures/word-problems.jsonl, and an adapter of benchmarks/eight_billion.py. Tables: seconds and the most memory that the GPU
held, the base's counted, for each way to convert it; milliseconds of a token with it as LoRA, as decoded codes, and as codes read
module by module; and what the search for codes takes on the GPU beside one core. Nothing is said about behaviour: weights are
noise.
"""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from eight_billion import write_adapter
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bslora_convert import Recipe, Training, compress, load_many, verify
from bslora_convert.bslora.codes.trellis import tables
from bslora_convert.coding.viterbi import paths, paths_on_device
from bslora_convert.peft.model import table_of

ROOT = Path(__file__).parents[1]
TINY, ROWS = ROOT / "fixtures" / "tiny" / "base", ROOT / "fixtures" / "word-problems.jsonl"


def write_base(place: Path, layers: int) -> None:
    """Random weights, once."""
    if (place / "config.json").is_file():
        return
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(TINY / name, place / name)
    model.save_pretrained(place)


def costs(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, seconds, and the most GB that the GPU held."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    found = run()
    torch.cuda.synchronize()
    return found, time.perf_counter() - began, torch.cuda.max_memory_allocated() / 1e9


def conversions(lora: Path, base: Path, out: Path, rows: int, steps: int) -> Table:
    """Each way to convert, and its proof."""
    few = out / "rows.jsonl"
    few.write_text("".join(ROWS.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    evidence = {"base_model": str(base), "prompts": str(few)}
    recipes = {
        "ke in floats": Recipe(transform="ke", budget=0.4459),
        "codes": Recipe(transform="none", bytes=0.125),
        "codes, --prompts": Recipe(transform="none", bytes=0.125, **evidence),
        "ke, --prompts": Recipe(transform="ke", budget=0.3, **evidence),
        f"ke, --finetune, {steps} steps": Recipe(transform="ke", budget=0.3, **evidence, finetune=str(few)),
        f"codes, --finetune, {steps} steps": Recipe(transform="none", bytes=0.0625, **evidence, finetune=str(few)),
    }
    table = Table(title=f"{rows} rows")
    for column in ("", "seconds", "tokens trained a second", "GB on the GPU"):
        table.add_column(column, justify="right" if column else "left")
    for number, (name, recipe) in enumerate(recipes.items()):
        place = out / "converted" / str(number)
        training = Training(max_steps=steps, evaluate_every=steps) if recipe.calibration.finetune is not None else None
        record, seconds, most = costs(
            lambda recipe=recipe, place=place, training=training: compress(
                lora, place, recipe, training=training, overwrite=True, report_html=False
            )
        )
        trained = f"{record['training']['tokens_per_second']:,.0f}" if training else ""
        table.add_row(name, f"{seconds:.1f}", trained, f"{most:.1f}")
        print(name, f"{seconds:.1f} s {most:.1f} GB", flush=True)
    for dtype in ("bfloat16", "float32"):
        found, seconds, most = costs(
            lambda dtype=dtype: verify(
                out / "converted" / "1", lora, base, prompts=few, max_new_tokens=16, device="cuda", dtype=dtype
            )
        )
        table.add_row(f"verify in {dtype}, 16 tokens: KL {found['kl']:.2g}", f"{seconds:.1f}", "", f"{most:.1f}")
    return table


@torch.inference_mode()
def tokens(lora: Path, coded: Path, base: Path, repeats: int = 10) -> Table:
    """Milliseconds of a token, by the clock around a synchronised pass, the median."""
    names = [str(number) for number in range(4)]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).cuda().eval()
    ids = torch.arange(4, device="cuda")[:, None]
    table = Table(title="a token")
    for column in ("", "ms", "GB beyond the base"):
        table.add_column(column, justify="right" if column else "left")
    empty = torch.cuda.memory_allocated()

    def timed(name: str, run: Callable[[], Any], before: Callable[[], Any] = lambda: None) -> None:
        spent = []
        for _ in range(repeats + 2):
            before()
            torch.cuda.synchronize()
            began = time.perf_counter()
            run()
            torch.cuda.synchronize()
            spent.append(1e3 * (time.perf_counter() - began))
        held = (torch.cuda.memory_allocated() - empty) / 1e9
        table.add_row(name, f"{sorted(spent[2:])[repeats // 2]:.1f}", f"{held:.3f}")

    timed("base alone", lambda: model(input_ids=ids[:1]))
    tuned = PeftModel.from_pretrained(model, str(lora), adapter_name="0").eval()
    timed("LoRA", lambda: tuned(input_ids=ids[:1]))
    for name in names[1:]:
        tuned.load_adapter(str(lora), name)
    timed("LoRA, 4 in a batch", lambda: tuned(input_ids=ids, adapter_names=names))
    model = tuned.unload()
    floats = load_many(model, coded.parent, dict.fromkeys(names, coded.name), resident="floats")
    timed("floats", lambda: floats(input_ids=ids[:1]))
    timed("floats, 4 in a batch", lambda: floats(input_ids=ids, adapter_names=names))
    model = floats.unload()
    codes = load_many(model, coded.parent, dict.fromkeys(names, coded.name))
    table = table_of(codes)
    assert table is not None
    timed("codes, hot", lambda: codes(input_ids=ids[:1]))
    timed("codes, cold", lambda: codes(input_ids=ids[:1]), lambda: table.decoded.drop(table.adapters["0"]))
    timed("codes, 4 in a batch, hot", lambda: codes(input_ids=ids, adapter_names=names))
    table.decoded.limit = 0
    timed("codes, module by module", lambda: codes(input_ids=ids[:1]))
    timed("codes, 4 in a batch, module by module", lambda: codes(input_ids=ids, adapter_names=names))
    return table


def searches() -> Table:
    """Nanoseconds a number of the search for codes: on the GPU, and on one core."""
    table = Table(title="the search for codes, ns a number")
    for column in ("bits", "GPU, 1,024 vectors", "GPU, 64 vectors", "one core"):
        table.add_column(column, justify="right")
    x = torch.randn(1024, 1024)
    for width in (1, 2, 4, 6, 8):
        spent = []
        for run in (
            lambda: paths_on_device(x.cuda(), tables()[width], width),  # noqa: B023
            lambda: paths_on_device(x[:64].cuda(), tables()[width], width),  # noqa: B023
            lambda: paths(x[:32].numpy(), tables()[width].numpy(), width),  # noqa: B023
        ):
            run()
            spent.append(min(costs(run)[1] for _ in range(2)))
        table.add_row(str(width), *(f"{1e9 * s / (n * 1024):.0f}" for s, n in zip(spent, (1024, 64, 32), strict=True)))
    return table


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("build/on-gpu"))
    options = parser.parse_args()
    base, lora = options.out / f"base-{options.layers}", options.out / f"lora-{options.layers}-{options.rank}"
    write_base(base, options.layers)
    if not lora.is_dir():
        write_adapter(lora, options.rank, options.layers)
    console = Console(width=120)
    console.print(torch.cuda.get_device_name())
    console.print(conversions(lora, base, options.out, options.rows, options.steps))
    console.print(tokens(lora, options.out / "converted" / "1", base))
    console.print(searches())


if __name__ == "__main__":
    main()
