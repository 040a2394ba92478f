"""`batch --share-across` against the same library converted separately: bytes of every file that a server needs, and errors.

    python benchmarks/sharing.py                                    # planted libraries, shapes of SmolLM2-135M, four layers
    python benchmarks/sharing.py --library DIRECTORY [--budgets 0.9,0.4459,0.25]

A planted adapter is ΔW_i = U C_i V with U (out, 16), V (16, in) of its library and a C_i (16, 16) of its own, plus as much noise
in both factors as is said. `expected` is by hand, N r Σ (out + in) over r Σ (out + in) + N Σ r².
"""

import argparse
import tempfile
from pathlib import Path

import torch

from bslora_convert.library.manifest import read_manifest
from bslora_convert.lora.writer import save_lora
from bslora_convert.modules.factors import Factors
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.verbs.batch import batch

RANK = 16
SHAPES = {
    f"model.layers.{layer}.{kind}": shape
    for layer in range(4)
    for kind, shape in {
        "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536),
    }.items()
}  # fmt: skip


def plant(place: Path, count: int, shared: bool, noise: float) -> None:
    """Writes a library of `count` adapters; without `shared` the bases are each one's own."""
    for number in range(count):
        own = torch.Generator().manual_seed(number + 1)
        common = torch.Generator().manual_seed(0) if shared else own
        modules = {}
        for name, (out, across) in SHAPES.items():
            left, right = torch.randn(out, RANK, generator=common), torch.randn(RANK, across, generator=common)
            b = left @ torch.randn(RANK, RANK, generator=own) / RANK**0.5 + noise * torch.randn(
                out, RANK, generator=own
            )
            modules[name] = Factors(b, right + noise * torch.randn(RANK, across, generator=own))
        (place / f"a{number:03d}").mkdir(parents=True)
        save_lora(
            place / f"a{number:03d}",
            modules,
            dict.fromkeys(modules, "linear"),
            {},
            {"base_model_name_or_path": "planted"},
            torch.bfloat16,
        )


def measure(library: Path, recipe: Recipe, title: str, expected: float | None) -> None:
    """Prints one row."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "out"
        batch(library, out, recipe, workers=0, report_html=False)
        before = {row["id"]: row["relative_error"] for row in read_manifest(out)}
        summary = batch(library, out, recipe, workers=0, report_html=False, share_across=True)
        after = {row["id"]: row["relative_error"] for row in read_manifest(out)}
    amount = summary["sharing"]["bytes"]
    joint = amount["adapters"] + amount["bases"]
    worst = max((after[name] / before[name] for name in before), default=1.0)
    shared = sum(
        sum(cluster["modules"].values()) for group in summary["sharing"]["groups"] for cluster in group["shared"]
    )
    factor = amount["separate"] / joint
    row = [
        title, str(len(before)), str(shared), f"{amount['separate']:,}", f"{joint:,}", f"{factor:.2f}",
        "" if expected is None else f"{expected:.2f}",
        f"{max(before.values()):.4f}", f"{max(after.values()):.4f}", f"{worst:.3f}",
    ]  # fmt: skip
    print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", type=Path)
    parser.add_argument("--budgets", default="0.9,0.4459,0.25")
    options = parser.parse_args()
    columns = ("library", "adapters", "modules shared", "separate, bytes", "joint", "factor", "expected")
    columns += ("largest error", "joint", "worst ratio")
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    if options.library is not None:
        for budget in map(float, options.budgets.split(",")):
            measure(options.library, Recipe(transform="none", budget=budget), f"budget {budget:g}", None)
        return
    width, modules = sum(map(sum, SHAPES.values())), len(SHAPES)
    for count in (2, 4, 8, 16):
        with tempfile.TemporaryDirectory() as place:
            plant(Path(place), count, True, 0.0)
            expected = count * RANK * width / (RANK * width + count * modules * RANK**2)
            measure(Path(place), Recipe(transform="none", ranks=(RANK, 0, 0)), "planted", expected)
    for noise in (0.1, 0.3, 1.0):
        with tempfile.TemporaryDirectory() as place:
            plant(Path(place), 8, True, noise)
            measure(Path(place), Recipe(transform="none", budget=0.5), f"planted, noise {noise:g}, half size", None)
    with tempfile.TemporaryDirectory() as place:
        plant(Path(place), 8, False, 0.0)
        measure(Path(place), Recipe(transform="none", ranks=(RANK, 0, 0)), "unrelated", None)


if __name__ == "__main__":
    main()
