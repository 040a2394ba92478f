"""What A's random initialisation is worth: sizes, behaviour and times with it and without, alone and in a library.

    python benchmarks/initialisation.py sizes LORA … [--base-model BASE --prompts ROWS.jsonl --limit 60] [--picture FILE.svg]
    python benchmarks/initialisation.py times LORA
    python benchmarks/initialisation.py finding LORA
    python benchmarks/initialisation.py library LORA … [--count 100] [--out build/siblings]

sizes     `compress --transform none` at an error of 0.1 and at shares of the bytes, with `--init auto` and `--init none`: bytes,
          energy lost, and on a base model the KL to the original. The picture shows the lost energy by bytes.
times     CPU seconds of `compress`, `expand` and reading in fresh processes, with and without; ratios are within this run. And of
          the draws of an adapter of 8B.
finding   CPU seconds of the search: in the adapter, in it with A's of a seed that is not tried, and in A's that are no draws.
library   adapters of one seed that nobody knows, planted from real ones: the draws of their A's are replaced by others, and
          what training changed is turned by a random rotation, so that no two are alike. What `batch` makes of them at an error
          of 0.1, bytes an adapter by the number of adapters that share the file, and from how many on it pays.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from bslora_convert import Recipe, batch, compress, load_compact, load_lora, verify
from bslora_convert.bslora.common import commons_in
from bslora_convert.conversion.initial import look_for, modules_of
from bslora_convert.initialisation.drawn import Module
from bslora_convert.initialisation.found import find
from bslora_convert.initialisation.initial import Initial, tensor_key
from bslora_convert.initialisation.stream import Place

ERROR = 0.1
SHARES = (0.125, 0.0625, 0.03125, 0.015625)
EIGHT_BILLION = {
    "q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096), "gate": (14336, 4096), "up": (14336, 4096),
    "down": (4096, 14336),
}  # fmt: skip
NEW_SEED = 618_033_988  # of planted siblings; not one that a search tries


def sizes(lora: Path, out: Path) -> Iterator[dict[str, Any]]:
    """A row for each size, with and without."""
    for asked in ({"max_error": ERROR}, *({"bytes": share} for share in SHARES)):
        for init in ("none", "auto"):
            place = out / f"{lora.name}-{next(iter(asked.values())):g}-{init}"
            shutil.rmtree(place, ignore_errors=True)
            record = compress(lora, place, Recipe(transform="none", init=init, **asked), report_html=False)
            (name, value), found = next(iter(asked.items())), record.initialisation
            yield {
                "adapter": lora.name, "asked": f"{name} {value:g}", "init": init, "place": str(place),
                "byte_ratio": record.compact.byte_ratio, "lost": record.weight.relative_error**2,
                "changed": None if found is None else found.changed,
            }  # fmt: skip


def behave(row: dict[str, Any], lora: Path, options: argparse.Namespace) -> None:
    """Adds the behaviour on the prompts to a row."""
    found = verify(
        row["place"], lora, options.base_model, prompts=options.prompts, limit=options.limit, max_new_tokens=0
    )
    row |= {"kl": found.kl, "retention": found.retention, "agreement": found.agreement}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The rows as a table."""
    table = Table()
    for column in ("adapter", "asked", "init", "bytes", "energy lost", "KL", "retention", "same first choice"):
        table.add_column(column)
    for row in rows:
        told = (f"{row['kl']:.7f}", f"{row['retention']:.3%}", f"{row['agreement']:.2%}") if "kl" in row else ("–",) * 3
        table.add_row(
            row["adapter"], row["asked"], row["init"], f"{row['byte_ratio']:.2%}", f"{row['lost']:.3%}", *told
        )
    Console(width=140).print(table)


def picture(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Lost energy by bytes, both axes logarithmic: a line with and one without for each adapter."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "initialisation",
    }  # text as text; the same each time
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for number, adapter in enumerate(dict.fromkeys(row["adapter"] for row in rows)):
        for init, style in (("none", "--"), ("auto", "-")):
            line = sorted((r["byte_ratio"], r["lost"]) for r in rows if r["adapter"] == adapter and r["init"] == init)
            label = f"{adapter.split('-')[-2]}, " + ("initialisation known" if init == "auto" else "without")
            axes.plot(*zip(*line, strict=True), style, color=f"C{number}", marker="o", markersize=4, label=label)
    axes.set(xscale="log", yscale="log", xlabel="share of the LoRA's bytes", ylabel="share of the update's energy lost")
    ticks = [*SHARES, 0.2]
    axes.set_xticks(ticks, [f"{100 * tick:.3g} %" for tick in ticks], minor=False)
    heights = [0.01, 0.03, 0.1, 0.3]
    axes.set_yticks(heights, [f"{100 * height:.0f} %" for height in heights], minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, metadata={"Date": None})


def spent() -> float:
    """CPU seconds of this process and of all that it waited for."""
    both = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in both)


def cpu_seconds(*words: str) -> float:
    """CPU seconds of a command of ours in a process of its own, one thread."""
    before = spent()
    subprocess.run(
        [sys.executable, *words], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return spent() - before


def times(lora: Path, out: Path) -> None:
    """CPU seconds of what a user waits for, the least of three."""
    reading = "import sys; from bslora_convert import load_compact; load_compact(sys.argv[1])"
    found: dict[str, dict[str, float]] = {}
    for init in ("none", "auto"):
        place = out / f"times-{init}"
        ours = ("-m", "bslora_convert")
        runs = {
            "compress --bytes 0.125": (*ours, "compress", str(lora), str(place), "--transform", "none", "--bytes", "0.125",
                                       "--init", init, "--no-report-html", "--overwrite", "-q"),
            "expand": (*ours, "expand", str(place), f"{place}-lora", "--overwrite", "-q"),
            "load_compact": ("-c", reading, str(place)),
        }  # fmt: skip
        for name, words in runs.items():
            found.setdefault(name, {})[init] = min(cpu_seconds(*words) for _ in range(3))
    table = Table("CPU s, process and imports included", "without", "with", "ratio")
    for name, row in found.items():
        table.add_row(name, f"{row['none']:.2f}", f"{row['auto']:.2f}", f"{row['auto'] / row['none']:.2f}")
    Console().print(table)
    places, lengths, at = {}, {}, 0
    for layer in range(32):
        for kind, (high, width) in EIGHT_BILLION.items():
            key = tensor_key(f"{layer}.{kind}")
            places[key], lengths[key] = Place(at + 16 * (high + width), 16), width
            at += 16 * (high + 2 * width)
    began = time.process_time()
    found = Initial.at(0, places, lengths)
    print(
        f"draws of Llama-3-8B's seven kinds, rank 16: {at:,} outputs, {time.process_time() - began:.2f} CPU s once a process, "
        f"{sum(draws.nbytes for draws in found.draws.values()) / 1e6:.0f} MB"
    )


def finding(lora: Path) -> None:
    """CPU seconds of the search, by what there is to find."""
    modules = modules_of(load_lora(lora))
    fresh = torch.Generator().manual_seed(NEW_SEED)
    unknown = {
        name: Module((torch.rand(m.a.shape, generator=fresh) * 2 - 1) / m.width**0.5, m.out, m.kind)
        for name, m in modules.items()
    }
    learned = {name: Module(torch.randn(m.a.shape, generator=fresh), m.out, m.kind) for name, m in modules.items()}
    table = Table("A", "default, CPU s", "found", "search, CPU s", "found")
    for name, adapter in (("the adapter's", modules), ("of a seed not tried", unknown), ("no draws", learned)):
        row = [name]
        for thorough in (False, True):
            began = time.process_time()
            found = find(adapter, thorough=thorough)
            row += [f"{time.process_time() - began:.1f}", "–" if found is None else f"seed {found.seed}"]
        table.add_row(*row)
    Console().print(table)


def planted(loras: Sequence[Path], count: int, out: Path) -> Path:
    """Adapters of one unknown seed in `out`, from real ones whose seed is found."""
    parts = []
    for lora in loras:
        adapter = load_lora(lora)
        known = look_for(adapter, "auto")
        if known is None:
            raise SystemExit(f"{lora}: its initialisation was not found, so no other can be planted")
        parts.append((lora, adapter, known.initial))
    fresh = torch.Generator().manual_seed(NEW_SEED)
    draws = {name: torch.rand(m.a.shape, generator=fresh) * 2 - 1 for name, m in parts[0][1].modules.items()}
    for number in range(count):
        lora, _, initial = parts[number % len(parts)]
        tensors, turns = load_file(lora / "adapter_model.safetensors"), torch.Generator().manual_seed(number)
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            name, other = (
                key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"),
                key.replace("lora_A", "lora_B"),
            )
            a, b, base = tensors[key].float(), tensors[other].float(), initial.base(name)
            if base is None:
                continue
            mix = a @ torch.linalg.pinv(base)
            turn = torch.linalg.qr(torch.randn(len(a), len(a), generator=turns))[0]
            scale = float((mix @ base).norm() / draws[name].norm())
            tensors[key] = (scale * draws[name] + turn.T @ (a - mix @ base)).to(tensors[key].dtype)
            tensors[other] = (b @ turn).to(tensors[other].dtype)
        place = out / f"t{number:03d}"
        place.mkdir(parents=True)
        save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
        shutil.copy(lora / "adapter_config.json", place)
    return out


def library(loras: Sequence[Path], count: int, out: Path) -> None:
    """What siblings take together, by their number."""
    shutil.rmtree(out, ignore_errors=True)
    source = planted(loras, count, out / "in")
    recipe = Recipe(transform="none", max_error=ERROR)
    seconds = {}
    for name, one in (("with", recipe), ("without", recipe.but(init="none"))):
        before = spent()
        batch(source, out / name, one, workers=2, report_html=False)
        seconds[name] = spent() - before
    rows = [json.loads(line) for line in (out / "with" / "manifest.jsonl").read_text().splitlines()]
    apart = [json.loads(line) for line in (out / "without" / "manifest.jsonl").read_text().splitlines()]
    common = sum(path.stat().st_size for path in commons_in(out / "with"))
    mean, plain = (sum(row["bytes"] for row in found) / len(found) for found in (rows, apart))
    size = rows[0]["source_bytes"]
    table = Table(
        "adapters that share it", "bytes an adapter, the file counted", "share of the LoRA", "against without"
    )
    for several in sorted({n for n in (2, 3, 4, 5, 10, 30, count) if n <= count}):
        each = mean + common / several
        table.add_row(str(several), f"{each:,.0f}", f"{each / size:.2%}", f"{each / plain:.2f}")
    Console().print(table)
    print(
        f"without {plain:,.0f} bytes an adapter ({plain / size:.2%}); the file {common:,} bytes ({common / size:.2%} of a LoRA)"
    )
    print(f"it pays from {next((n for n in range(1, count + 1) if mean + common / n < plain), 0)} adapters on")
    print(f"CPU seconds of batch: {seconds['with']:.0f} with, {seconds['without']:.0f} without")
    load_compact(out / "with" / rows[0]["id"])


def main() -> None:
    """Prints what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sizes", "times", "finding", "library"))
    parser.add_argument("lora", type=Path, nargs="+")
    parser.add_argument("--base-model")
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("build/initialisation"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "times":
        times(options.lora[0], options.out)
    elif options.what == "finding":
        finding(options.lora[0])
    elif options.what == "library":
        library(options.lora, options.count, options.out / "library")
    else:
        rows = []
        for lora in options.lora:
            for row in sizes(lora, options.out):
                if options.base_model is not None and options.prompts is not None:
                    behave(row, lora, options)
                rows.append(row)
                print(json.dumps(row), flush=True)
        show(rows)
        if options.picture is not None:
            picture(rows, options.picture)


if __name__ == "__main__":
    main()
