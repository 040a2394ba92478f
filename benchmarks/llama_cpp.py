"""What llama.cpp answers with each dtype of `expand --format gguf`, beside transformers and PEFT in float32.

    pip install --only-binary :all: xllamacpp
    python benchmarks/llama_cpp.py fixtures/smollm2-135m-math-r16 --base-model build/base [--recipe none|bytes]

The base is written as GGUF in float32 and flash attention is off, so that the adapter alone is what differs. Greedy: each row
says how many tokens are those that PEFT would have chosen, and how far the log-probability of a chosen token is off at most.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

from bslora_convert import Recipe, compress, expand

sys.path.append(str(Path(__file__).parents[1]))  # the base's file is made as the tests make it
from tests.serving.bases import write_base
from tests.serving.llama import TOKENS, answers, difference

RECIPES = {"none": Recipe(transform="none", budget=1.0), "bytes": Recipe(transform="none", bytes=0.125)}
DTYPES = ("f32", "bf16", "f16", "q8_0")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path)
    parser.add_argument("--base-model", type=Path, required=True)
    parser.add_argument("--recipe", choices=RECIPES, default="bytes")
    arguments = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.base_model, dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as place:
        here = Path(place)
        base = write_base(model, arguments.base_model, here / "base.gguf")
        bare = difference(model, answers(base))
        compress(arguments.lora, here / "compact", RECIPES[arguments.recipe])
        expand(here / "compact", here / "lora", dtype="float32")
        peft = PeftModel.from_pretrained(model, str(here / "lora"))
        table = Table(
            "file", "bytes", f"equal of {TOKENS * 3}", "max |Δ log p|", title=f"{arguments.lora} ({arguments.recipe})"
        )
        table.add_row("no adapter", "", str(bare.equal), f"{bare.largest:.1e}")
        for dtype in DTYPES:
            out = here / dtype
            record = expand(
                here / "compact", out, engine="llama.cpp", base_model=str(arguments.base_model), dtype=dtype
            )
            found = difference(peft, answers(base, out / "adapter.gguf"))
            table.add_row(dtype, f"{record['bytes']:,}", str(found.equal), f"{found.largest:.1e}")
        Console().print(table)


if __name__ == "__main__":
    main()
