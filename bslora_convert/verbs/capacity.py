"""How many adapters of a converted library fit beside the base model, by each engine's rule (the paper's Figure 6).

slots     an engine reserves slots of one rank, rounded up to a step that it allows: step · Σ (out + in) · 2 bytes each,
whatever a file's size; a compact adapter is served as the LoRA that it expands to
paged     an engine keeps an adapter's own numbers (S-LoRA's unified paging, PEFT): its bytes as LoRA, or those of the compact
form once it is loaded, codes decoded and shared bases multiplied out
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bslora_convert.errors import RecipeError
from bslora_convert.verbs.inspect import SLOT_BYTES, SLOT_STEPS

GIB = 1 << 30


def capacity(rows: Sequence[Mapping[str, Any]], gpu_gib: float, base_gib: float) -> dict[str, Any]:
    """Adapters that fit in what the base leaves of a GPU; rows: of a manifest.

    :raises RecipeError: when the base leaves nothing, or nothing was converted.
    """
    free = (gpu_gib - base_gib) * GIB
    if not (math.isfinite(free) and free > 0 <= base_gib):
        raise RecipeError(
            f"gpu_gib is {gpu_gib:g} and base_gib {base_gib:g}: the base must leave room", "gpu_gib", "base_gib"
        )
    good = [row for row in rows if row["status"] in ("ok", "skipped")]
    if not good:
        raise RecipeError("the manifest holds no converted adapter")
    width = max(int(row["settings"]["width"]) for row in good)
    ranks = {
        "lora": max(int(row["settings"]["source_rank"]) for row in good),
        "compact": max(int(row["settings"]["expanded_rank"]) for row in good),
    }
    steps = {kind: next((step for step in SLOT_STEPS if step >= rank), None) for kind, rank in ranks.items()}
    mean = {
        "lora": sum(int(row["source_bytes"]) for row in good) / len(good),
        "compact": sum(int(row["settings"].get("loaded_bytes", row["bytes"])) for row in good) / len(good),
    }
    return {
        "gpu_gib": gpu_gib,
        "base_gib": base_gib,
        "slots": {
            kind: {
                "rank": ranks[kind],
                "slot_rank": step,
                "adapters": int(free // (step * width * SLOT_BYTES)) if step else 0,
            }
            for kind, step in steps.items()
        },
        "paged": {kind: {"mean_bytes": int(size), "adapters": int(free // size)} for kind, size in mean.items()},
    }
