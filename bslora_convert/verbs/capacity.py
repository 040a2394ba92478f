"""How many adapters of a converted library fit beside the base model, by each engine's rule (the paper's Figure 6).

slots     an engine reserves slots of one rank, whatever a file's size (`library/serving.py`); a compact adapter is served as the
LoRA that it expands to
paged     an engine keeps an adapter's own numbers (S-LoRA's unified paging, PEFT): its bytes as LoRA, or those of the compact
form once it is loaded, codes decoded
resident  PEFT with this package's tuner: what is in codes stays so, beside what may be decoded at a time (`bslora/decoded.py`)
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bslora_convert.bslora.decoded import DECODED_BYTES
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.library.manifest import DONE
from bslora_convert.library.serving import GIB, slots
from bslora_convert.results.library import Capacity


def capacity(rows: Sequence[Mapping[str, Any]], gpu_gib: float, base_gib: float) -> Capacity:
    """Adapters that fit in what the base leaves of a GPU; rows: of a manifest.

    :raises RecipeError: when the base leaves nothing, or nothing was converted. :raises InputError: when a row is damaged.
    """
    free = (gpu_gib - base_gib) * GIB
    if not (math.isfinite(free) and free > 0 <= base_gib):
        raise RecipeError(
            f"gpu_gib is {gpu_gib:g} and base_gib {base_gib:g}: the base must leave room", "gpu_gib", "base_gib"
        )
    try:
        return _fitting(rows, free, gpu_gib, base_gib)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError("a row of the manifest lacks what `batch` writes; run `batch` again to make it anew") from None


def _fitting(rows: Sequence[Mapping[str, Any]], free: float, gpu_gib: float, base_gib: float) -> Capacity:
    good = [row for row in rows if row["status"] in DONE]
    if not good:
        raise RecipeError("the manifest holds no converted adapter")
    mean = {
        "lora": sum(int(row["source_bytes"]) for row in good) / len(good),
        "compact": sum(int(row["settings"].get("loaded_bytes", row["bytes"])) for row in good) / len(good),
    }
    held = sum(
        int(row["bytes"] if _is_coded(row) else row["settings"].get("loaded_bytes", row["bytes"])) for row in good
    )
    decoded = DECODED_BYTES if any(_is_coded(row) for row in good) else 0
    return Capacity(
        gpu_gib=gpu_gib,
        base_gib=base_gib,
        slots={
            kind: {
                "rank": slot["rank"],
                "slot_rank": slot["slot_rank"],
                "adapters": int(free // slot["bytes"]) if slot["bytes"] else 0,
            }
            for kind, slot in slots(good).items()
        },
        paged={kind: {"mean_bytes": int(size), "adapters": int(free // size)} for kind, size in mean.items()},
        resident={
            "mean_bytes": int(held / len(good)),
            "decoded_bytes": decoded,
            "adapters": int(max(free - decoded, 0) // (held / len(good))),
        },
    )


def _is_coded(row: Mapping[str, Any]) -> bool:
    """Whether the adapter is in codes."""
    return "loaded_bytes" in row["settings"]
