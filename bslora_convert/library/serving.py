"""What a converted library costs on a server that reserves slots: before, as LoRAs, and after, as compact adapters expanded.

Every adapter gets a slot of the same size, so the widest adapter and the largest rank of the library decide.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bslora_convert.files.record import named
from bslora_convert.layers.slots import TARGET_MODULES, bytes_of, step_of

GIB = 1 << 30
RANKS = {"lora": "source_rank", "compact": "expanded_rank"}  # fields of a row's settings
NAMED = 3  # adapters that a warning names


def slots(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`{"lora": {"rank", "slot_rank", "bytes"}, "compact": …}`: the largest rank, the slot that holds it, bytes of one slot.

    rows: of the manifest, converted ones, one at least. slot_rank and bytes are None where no slot holds the rank.
    """
    width = max(int(row["settings"]["width"]) for row in rows)
    ranks = {kind: max(int(row["settings"][field]) for row in rows) for kind, field in RANKS.items()}
    steps = {kind: step_of(rank) for kind, rank in ranks.items()}
    return {
        kind: {"rank": ranks[kind], "slot_rank": step, "bytes": bytes_of(step, width) if step else None}
        for kind, step in steps.items()
    }


def serving(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """`serving` of summary.json: `slots` with adapters a GiB, and who makes the slot larger; None where nothing was converted.

    outgrown: adapters whose expanded rank exceeds the library's slot before, so that fewer fit than before. words, warning: both
    for a reader; the warning is None where nothing outgrew its slot.
    """
    if not rows:
        return None
    found = slots(rows)
    for slot in found.values():
        slot["adapters_per_gib"] = GIB // slot["bytes"] if slot["bytes"] else 0
    before = found["lora"]["slot_rank"]
    outgrown = [row["id"] for row in rows if before and int(row["settings"]["expanded_rank"]) > before]
    kinds = together(row["settings"].get("target_modules") for row in rows)
    told = (
        f" With {TARGET_MODULES} {' '.join(kinds)}; without it vLLM makes room in every linear layer." if kinds else ""
    )
    words = f"On a server with slots: {_slot(found['lora'])} before, {_slot(found['compact'])} after.{told}"
    return {
        **found,
        "target_modules": kinds,
        "outgrown": outgrown,
        "words": words,
        "warning": _warning(found, outgrown),
    }


def together(kinds: Iterable[Sequence[str] | None]) -> list[str] | None:
    """`target_modules` that make room for all of several adapters; None where one can't be told."""
    every = list(kinds)
    return None if None in every else sorted({name for own in every for name in own or ()})


def _warning(found: Mapping[str, Any], names: Sequence[str]) -> str | None:
    if not names:
        return None
    return (
        f"A server holds fewer adapters than before: the expanded rank {found['compact']['rank']} exceeds the slot of "
        f"{found['lora']['slot_rank']} that the sources need ({named(names, NAMED)})."
    )


def _slot(slot: Mapping[str, Any]) -> str:
    if slot["slot_rank"] is None:
        return f"no slot for rank {slot['rank']}"
    return f"{slot['bytes'] / 1e6:,.2f} MB an adapter (rank {slot['slot_rank']}), {slot['adapters_per_gib']:,} adapters a GiB"
