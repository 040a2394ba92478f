"""What a forward pass costs with a compact adapter beside LoRA of the source's rank and of the same expanded rank, all in PEFT.

    python benchmarks/forward.py [--layers 6] [--hidden 2048] [--repeats 5]

A Llama with random weights, adapters on all seven linear layers. Every column of a row is measured in turns within the same loop,
and its best time is divided by that of LoRA with the source's rank: machines are shared, ratios are what is comparable.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import bslora_convert.peft  # noqa: F401  registers the tuner
from bslora_convert import save_compact
from bslora_convert.bslora.form import BsloraForm, Module
from bslora_convert.bslora.form import Path as SharedPath
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice, Transform
from bslora_convert.modules.factors import Factors

SOURCE_RANK = 16
LOCAL, INTRA, INTER = 2, 4, 16  # the paper's triple
KINDS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
KINDS = (*KINDS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BATCHES = (1, 8, 32)
PREFILL, CACHED = 128, 64


def make_base(hidden: int, layers: int) -> LlamaForCausalLM:
    """A Llama with grouped queries and a small vocabulary, so that the adapted layers are what is timed."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 256 * 256, num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=max(1, hidden // 256), max_position_embeddings=1024,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def random_form(model: torch.nn.Module, layers: int, transform: Transform, ranks: tuple[int, int, int]) -> BsloraForm:
    """A form of these ranks over all seven kinds."""
    rows, columns = transform.pair_sizes
    local, intra, inter = ranks

    def pair(out: int, rank: int, width: int) -> Factors:
        return Factors(torch.randn(out, rank) / 100, torch.randn(rank, width) / 100)

    shared = {
        "intra": {f"model.layers.{layer}": pair(rows, intra, columns) for layer in range(layers)},
        "inter": {"all": pair(rows, inter, columns)},
    }
    modules = {}
    for layer in range(layers):
        for kind in KINDS:
            name = f"model.layers.{layer}.{kind}"
            out, width = model.get_submodule(name).weight.shape
            own = {key: torch.randn(shape) for key, shape in transform.own_shapes((out, width), 1).items()}
            paths = {"intra": SharedPath(f"model.layers.{layer}", own), "inter": SharedPath("all", own)}
            modules[name] = Module((out, width), pair(out, local, width), paths)
    return BsloraForm(transform, modules, shared)


def contenders(hidden: int, layers: int) -> dict[str, Any]:
    """Models by name, the first one being what the others are compared with."""
    found: dict[str, Any] = {}
    expanded = LOCAL + INTRA + INTER
    for rank in (SOURCE_RANK, expanded):
        config = LoraConfig(r=rank, target_modules=[kind.rpartition(".")[2] for kind in KINDS])
        found[f"LoRA {rank}"] = get_peft_model(make_base(hidden, layers), config).eval()
    widest = hidden * 8 // 3 // 256 * 256
    forms: dict[str, tuple[Transform, tuple[int, int, int]]] = {
        "ke": (Kronecker(256), (LOCAL, INTRA, INTER)),
        "ss": (Slice(max(widest, hidden), max(widest, hidden)), (LOCAL, INTRA, INTER)),
        "gt": (Gate(256), (LOCAL, INTRA, INTER)),
    }
    for name, (transform, ranks) in forms.items():
        base = make_base(hidden, layers)
        with tempfile.TemporaryDirectory() as place:
            save_compact(random_form(base, layers, transform, ranks), Path(place), {"task_type": "CAUSAL_LM"}, {})
            found[name] = PeftModel.from_pretrained(base, place).eval()
    return found


@torch.inference_mode()
def measure(models: dict[str, Any], batch: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Best seconds of (prefill, one decoding step) by model."""
    ids = torch.randint(512, (batch, PREFILL))
    best = {name: [float("inf"), float("inf")] for name in models}
    caches = {name: model(input_ids=ids[:, :CACHED], use_cache=True).past_key_values for name, model in models.items()}
    for repeat in range(repeats):
        for name, model in models.items():
            began = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            best[name][0] = min(best[name][0], time.perf_counter() - began)
            for _ in range(4):
                began = time.perf_counter()
                model(input_ids=ids[:, :1], past_key_values=caches[name], use_cache=True)
                if repeat:
                    best[name][1] = min(best[name][1], time.perf_counter() - began)
                caches[name].crop(-1)
    return {name: (prefill, decode) for name, (prefill, decode) in best.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    logging.disable_progress_bar()
    models = contenders(options.hidden, options.layers)
    first = next(iter(models))
    table = Table(
        title=f"hidden {options.hidden}, {options.layers} layers, {torch.get_num_threads()} threads: time / {first}"
    )
    for column in ("", f"{first}, ms", *models):
        table.add_column(column, justify="right")
    for batch in BATCHES:
        times = measure(models, batch, options.repeats)
        for phase, title in enumerate((f"prefill {batch} x {PREFILL}", f"decode {batch}")):
            ratios = [f"{times[name][phase] / times[first][phase]:.3f}" for name in models]
            table.add_row(title, f"{times[first][phase] * 1000:.1f}", *ratios)
    Console().print(table)


if __name__ == "__main__":
    main()
