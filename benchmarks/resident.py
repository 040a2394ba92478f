"""Many adapters on one base model in PEFT: their memory, a decoding step, and the paper's Figure 6 with our numbers.

    python benchmarks/resident.py [memory] [steps] [figure] [--out build/resident] [--counts 1,10,100,1000] [--most-gib 3]

The adapter is fixtures/smollm2-135m-math-r16 (rank 16, all seven kinds, 9.8 MB in bf16), as LoRA and converted, loaded many times
under other names on a base of SmolLM2-135M's shapes with random weights.

memory   Growth of a fresh process's resident set from the loaded base to the last adapter: everything counts, Python's objects
         and the one adapter that is decoded too. What would take more than `--most-gib` is computed from the bytes an adapter of
         the largest count below it, and marked. LoRAs are copied inside of PEFT's layers, as loading them leaves them.
steps    CPU milliseconds of one token on one thread in float32, the least of `--repeats`.
figure   Adapters of the paper's benchmark (Llama-1-7B; q, k, v, up, down; 80 GiB): its own lines, and ours from the bytes that
         one in codes of those shapes was measured to take in a process.

Each number lands in OUT as it is measured, and the same command goes on. From nothing: memory twenty minutes, steps thirteen,
figure twenty, on two cores that are shared with as many other processes.
"""

import argparse
import copy
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LORA = ROOT / "fixtures" / "smollm2-135m-math-r16"
LORA_NUMBERS = 4_884_480
CODES = ("0.25", "0.125", "0.0625")
RECIPES: dict[str, dict[str, Any]] = {
    **{share: {"transform": "none", "bytes": float(share)} for share in CODES},
    "near": {"transform": "none", "max_error": 0.1},
    "near-plain": {"transform": "none", "max_error": 0.1, "init": "none"},
    "ke": {"transform": "ke", "budget": 0.4459},
}
KINDS = {  # name: (what is loaded, dtype of base and adapter, as what codes are held)
    "LoRA r=16, float32": ("lora", "float32", ""),
    "LoRA r=16, bf16": ("lora", "bfloat16", ""),
    **{f"codes {share}": (share, "bfloat16", "codes") for share in CODES},
    "codes of error 0.1": ("near", "bfloat16", "codes"),
    "the same with --init none": ("near-plain", "bfloat16", "codes"),
    "codes 0.125 as floats, bf16": ("0.125", "bfloat16", "floats"),
    "ke 0.4459, bf16": ("ke", "bfloat16", "floats"),
    "ke 0.4459, float32": ("ke", "float32", "floats"),
}
# The paper's benchmark: MiB of the base beside which adapters grow, and MiB of an adapter (its plotted numbers).
PAPER = {"LoRA r=8": (18264.15, 53.50), "BSLoRA": (14618.35, 17.4375)}
LLAMA = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 4096), "self_attn.v_proj": (4096, 4096),
         "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008)}  # fmt: skip


def resident() -> int:
    """Bytes of this process in memory, without what was given back and is only kept for the next who asks."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def base(dtype: str) -> Any:
    """A model of SmolLM2-135M's shapes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def loras(tuned: Any, model: Any, names: list[str]) -> Any:
    """LoRAs more on a model, or the first."""
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    if tuned is None:
        first, *names = names
        tuned = PeftModel.from_pretrained(model, str(LORA), first, autocast_adapter_dtype=False)
    first = next(iter(tuned.peft_config))
    layers = [module for module in tuned.modules() if isinstance(module, LoraLayer)]
    for name in names:
        tuned.peft_config[name] = copy.deepcopy(tuned.peft_config[first])
        for layer in layers:
            for attribute in layer.adapter_layer_names + layer.other_param_names:
                held = getattr(layer, attribute)
                if first in held:
                    held[name] = copy.deepcopy(held[first])
    return tuned


def loaded(tuned: Any, model: Any, place: Path, kind: str, names: list[str]) -> Any:
    """Adapters of a kind more on a model, or the first."""
    from bslora_convert import load_many

    what, _, held = KINDS[kind]
    if what == "lora":
        return loras(tuned, model, names)
    return load_many(tuned or model, place, dict.fromkeys(names, what), resident=held, autocast_adapter_dtype=False)


def grown(place: Path, kind: str, counts: list[int], most_gib: float) -> dict[str, list[float]]:
    """Growth of the resident set by so many adapters, and CPU milliseconds that loading one took, by count."""
    import torch

    import bslora_convert.peft  # noqa: F401  counts as there

    model = base(KINDS[kind][1])
    warm = loaded(None, base(KINDS[kind][1]), place, kind, ["0"])  # what the first of all brings into a process, kept
    with torch.inference_mode():
        model(input_ids=torch.arange(8)[None])
        warm(input_ids=torch.arange(8)[None])
    before = resident()
    tuned, there, found = None, 0, {}
    for count in counts:
        if there and count * (resident() - before) / there > most_gib * 2**30:
            break
        began = time.process_time()
        tuned = loaded(tuned, model, place, kind, [str(number) for number in range(there, count)])
        seconds = time.process_time() - began
        assert len(tuned.peft_config) == count
        found[str(count)] = [resident() - before, 1e3 * seconds / (count - there)]
        there = count
    return found


class Results:
    """Numbers of a file, each measured once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, key: str, measure: Callable[[], Any]) -> Any:
        """The number under a key."""
        if key not in self._held:
            began = time.perf_counter()
            self._held[key] = measure()
            self._path.write_text(json.dumps(self._held, indent=1))
            print(f"{key}: {self._held[key]} ({time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
        return self._held[key]


def convert(lora: Path, place: Path, share: str) -> None:
    """Converts an adapter, if that is still to be done."""
    from bslora_convert import Recipe, compress

    if not (place / share / "fidelity.json").exists():
        compress(lora, place / share, Recipe(**RECIPES[share]), report_html=False)


def memory(place: Path, results: Results, counts: list[int], most_gib: float) -> None:
    """The first table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="resident MB (adapters in the memory of one LoRA in bf16)")
    for column in ("", *(f"{count:,}" for count in counts), "kB an adapter", "ms to load one"):
        table.add_column(column, justify="right")
    sizes: dict[str, list[float]] = {}
    marks: dict[str, list[str]] = {}
    last: dict[str, float] = {}
    for kind in KINDS:
        asked = ",".join(map(str, counts))
        command = [sys.executable, __file__, "--out", str(place), "--most-gib", str(most_gib), "--load", kind, asked]
        found = results(f"{kind} x {asked}", lambda command=command: json.loads(_said(command)))
        largest = max(map(int, found))
        known = [found.get(str(count)) for count in counts]
        each = found[str(largest)][0] / largest
        sizes[kind] = [size[0] if size else count * each for size, count in zip(known, counts, strict=True)]
        marks[kind] = ["" if size else "*" for size in known]
        last[kind] = found[str(largest)][1]
    one = [size / count for size, count in zip(sizes["LoRA r=16, bf16"], counts, strict=True)]
    for kind, of in sizes.items():
        each_of = [size / count for size, count in zip(of, counts, strict=True)]
        cells = [
            f"{size / 1e6:,.1f}{mark} ({lora / mine:.1f})"
            for size, mark, lora, mine in zip(of, marks[kind], one, each_of, strict=True)
        ]
        table.add_row(kind, *cells, f"{each_of[-1] / 1e3:,.0f}", f"{last[kind]:.0f}")
    Console(width=150).print(table, "* computed from the bytes an adapter of the largest count that was measured")


def _said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]


def steps(place: Path, results: Results, repeats: int) -> None:
    """The second table."""
    from rich.console import Console
    from rich.table import Table

    found = results(
        "steps", lambda: json.loads(_said([sys.executable, __file__, "--out", str(place), "--time", str(repeats)]))
    )
    table = Table(title="CPU ms of a token, one thread, float32")
    for column in ("", "ms", "beside floats"):
        table.add_column(column, justify="right")
    for name, (milliseconds, peer) in found.items():
        table.add_row(name, f"{milliseconds:.1f}", f"{milliseconds / found[peer][0]:.2f}")
    Console(width=130).print(table)


def timed(place: Path, repeats: int) -> dict[str, tuple[float, str]]:
    """Milliseconds of every row, and the row that it is to be held against."""
    import torch

    from bslora_convert import load_many
    from bslora_convert.peft.model import table_of

    eight = {str(number): "0.125" for number in range(8)}
    lora, floats = (
        loras(None, base("float32"), list(eight)),
        load_many(base("float32"), place, eight, resident="floats"),
    )
    codes = load_many(base("float32"), place, eight)
    table = table_of(codes)
    assert table is not None
    room, size = table.decoded.limit, table.adapters["0"].decoded_bytes
    ids, turn = torch.arange(8)[:, None], iter(range(1 << 30))

    def one(model: Any) -> None:
        model(input_ids=ids[:1])

    def batch(model: Any) -> None:
        model(input_ids=ids, adapter_names=list(eight))

    def cold() -> None:
        table.decoded.drop(table.adapters["0"])
        one(codes)

    def switching(model: Any) -> None:
        model.set_adapter(str(next(turn) % 8), inference_mode=True)
        one(model)

    rows: dict[str, tuple[Callable[[], None], int, str]] = {
        "base alone": (lambda: one(codes.get_base_model()), room, "floats, one adapter"),
        "LoRA, one adapter": (lambda: one(lora), room, "floats, one adapter"),
        "floats, one adapter": (lambda: one(floats), room, "floats, one adapter"),
        "codes, one adapter, hot": (lambda: one(codes), room, "floats, one adapter"),
        "codes, one adapter, cold": (cold, room, "floats, one adapter"),
        "codes, one adapter, no room for it": (lambda: one(codes), 0, "floats, one adapter"),
        "floats, another of 8 each step": (lambda: switching(floats), room, "floats, another of 8 each step"),
        "codes, another of 8 each step": (lambda: switching(codes), room, "floats, another of 8 each step"),
        "codes, another of 8, room for 4": (lambda: switching(codes), 4 * size, "floats, another of 8 each step"),
        "LoRA, 8 in a batch": (lambda: batch(lora), room, "floats, 8 in a batch"),
        "floats, 8 in a batch": (lambda: batch(floats), room, "floats, 8 in a batch"),
        "codes, 8 in a batch, hot": (lambda: batch(codes), room, "floats, 8 in a batch"),
        "codes, 8 in a batch, room for 4": (lambda: batch(codes), 4 * size, "floats, 8 in a batch"),
    }  # fmt: skip
    best = dict.fromkeys(rows, float("inf"))
    with torch.inference_mode():
        for name, (run, limit, _) in rows.items():
            for model in (lora, floats, codes):
                model.set_adapter("0", inference_mode=True)
            table.decoded.limit = limit
            with codes.disable_adapter() if name == "base alone" else torch.inference_mode():
                for again in range(repeats + 9):
                    began = time.process_time()
                    run()
                    if again > 8:  # the others have been decoded by then
                        best[name] = min(best[name], time.process_time() - began)
            table.decoded.limit = room
    return {name: (best[name] * 1e3, rows[name][2]) for name in rows}


def figure(place: Path, results: Results) -> None:
    """The third table."""
    from rich.console import Console
    from rich.table import Table

    rows = [(name, start, each, "the paper's") for name, (start, each) in PAPER.items()]
    start = PAPER["LoRA r=8"][0]
    rows.append(("LoRA r=8 in bf16", start, PAPER["LoRA r=8"][1] / 2, "computed"))
    for share in CODES:
        command = [sys.executable, __file__, "--out", str(place), "--llama", share]
        each = results(f"Llama-1-7B in codes {share}", lambda command=command: float(_said(command)))
        rows.append((f"ours in codes, {share} of bf16", start + 1024, each / 2**20, "measured; 1 GiB to decode in"))
    table = Table(title="Llama-1-7B, q k v up down, 80 GiB")
    for column in ("", "MiB an adapter", "adapters", "times LoRA's", ""):
        table.add_column(column, justify="right")
    room = 80 * 1024
    whole = (room - start) // PAPER["LoRA r=8"][1]
    for name, begin, each, how in rows:
        fit = (room - begin) // each
        table.add_row(name, f"{each:.2f}", f"{fit:,.0f}", f"{fit / whole:.1f}", how)
    Console(width=120).print(table)


def of_llama(place: Path, share: str, count: int = 24) -> float:
    """Bytes of one adapter in codes of the shapes of the paper's benchmark, everything that is kept for it counted."""
    import torch
    from safetensors.torch import load_file, save_file

    from bslora_convert.bslora.decoded import Decoded
    from bslora_convert.bslora.resident import Resident
    from bslora_convert.peft import BsloraConfig
    from bslora_convert.peft.config import split

    lora, out = place / "llama-lora", place / "llama"
    if not (lora / "adapter_config.json").exists():
        lora.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for layer in range(32):
            for kind, (height, width) in LLAMA.items():
                prefix = f"base_model.model.model.layers.{layer}.{kind}"
                tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, width, generator=generator).bfloat16()
                tensors[f"{prefix}.lora_B.weight"] = torch.randn(height, 8, generator=generator).bfloat16()
        save_file(tensors, lora / "adapter_model.safetensors", metadata={"format": "pt"})
        targets = [kind.rpartition(".")[2] for kind in LLAMA]
        config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": targets, "task_type": "CAUSAL_LM"}
        (lora / "adapter_config.json").write_text(json.dumps(config))
    convert(lora, out, share)
    cache = Decoded()

    def held() -> Any:
        config = BsloraConfig.from_pretrained(str(out / share))
        adapter = Resident(config.stored, config.stored_dtype, cache, lambda _: torch.device("cpu"))
        adapter.fill(split(load_file(out / share / "adapter_model.safetensors"))[0], share)
        return config, adapter

    kept = [held() for _ in range(3)]
    before = resident()
    kept += [held() for _ in range(count)]
    return (resident() - before) / count


def main() -> None:
    """Prints the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", default=["memory", "steps", "figure"])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "resident")
    parser.add_argument("--counts", default="1,10,100,1000")
    parser.add_argument("--most-gib", type=float, default=3.0)
    parser.add_argument("--repeats", type=int, default=20)
    for hidden, values in (("--load", 2), ("--time", 1), ("--llama", 1)):
        parser.add_argument(hidden, nargs=values, help=argparse.SUPPRESS)
    options = parser.parse_args()
    place: Path = options.out
    if options.load:
        counts = [int(count) for count in options.load[1].split(",")]
        print(json.dumps(grown(place, options.load[0], counts, options.most_gib), separators=(",", ":")))
        return
    if options.time:
        print(json.dumps(timed(place, int(options.time[0])), separators=(",", ":")).replace(" ", "\\u0020"))
        return
    if options.llama:
        print(of_llama(place, options.llama[0]))
        return
    place.mkdir(parents=True, exist_ok=True)
    results = Results(place / "results.json")
    for share in RECIPES:
        convert(LORA, place, share)
    if "memory" in options.tables:
        memory(place, results, [int(count) for count in options.counts.split(",")], options.most_gib)
    if "steps" in options.tables:
        steps(place, results, options.repeats)
    if "figure" in options.tables:
        figure(place, results)


if __name__ == "__main__":
    main()
