"""Every transform at the same budgets on real adapters: share of energy lost, beside plain truncated SVD of the same size.

    python benchmarks/transforms.py fixtures/smollm2-135m-math-r16 [MORE_ADAPTERS …] [--budgets 0.4459,0.25,0.125]

Energies are of what was written and read back, in the source's dtype, of least error (`--gain least-squares`) as those of
truncated SVD are; the `svd` columns are exact, before rounding.
"""

import argparse
import tempfile
from pathlib import Path

from bslora_convert.recipe.recipe import Recipe
from bslora_convert.verbs.compress import compress

TRANSFORMS = ("none", "ke", "ss", "gt", "auto")


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapters", nargs="+", type=Path)
    parser.add_argument("--budgets", default="0.4459,0.25,0.125")
    options = parser.parse_args()
    print(
        "| adapter | budget | SVD, one rank | SVD, a rank per module | " + " | ".join(TRANSFORMS) + " | seconds of ke |"
    )
    print("|---" * (5 + len(TRANSFORMS)) + "|")
    for adapter in options.adapters:
        for budget in map(float, options.budgets.split(",")):
            cells, seconds = [], 0.0
            for transform in TRANSFORMS:
                with tempfile.TemporaryDirectory() as place:
                    recipe = Recipe(transform=transform, budget=budget, gain="least-squares")
                    record = compress(adapter, Path(place) / "out", recipe, report_html=False)
                assert record["compact"]["parameter_ratio"] <= budget
                lost, ranks = 1 - record["weight"]["energy_kept"], record["compact"]["ranks"]
                cells.append(
                    f"{lost:.3%} ({ranks['intra']}, {ranks['inter']})" if transform != "none" else f"{lost:.3%}"
                )
                if transform == "none":
                    svd = [record["baselines"][name]["relative_error"] ** 2 for name in ("svd_uniform", "svd_adaptive")]
                if transform == "ke":
                    seconds = record["seconds"]["total"]
            row = [adapter.name, f"{budget:g}", *(f"{value:.3%}" for value in svd), *cells, f"{seconds:.1f}"]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
