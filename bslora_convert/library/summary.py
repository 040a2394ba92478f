"""A library in numbers: how many ended how, bytes before and after, slots on a server, errors, throughput."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bslora_convert.library.jobs import Result
from bslora_convert.library.rows import BEHAVIOUR
from bslora_convert.library.serving import serving
from bslora_convert.results.library import BatchSummary, RunRecord
from bslora_convert.version import __version__

SCHEMA_VERSION = 1
STATUSES = ("ok", "skipped", "failed", "refused")


def summarise(
    rows: Sequence[Result],
    items: int,
    seconds: float | None,
    run: RunRecord,
    in_common: int = 0,
    notes: Sequence[str] = (),
) -> BatchSummary:
    """What `summary.json` holds. seconds: wall clock of this run, None where it did only a part.

    in_common: bytes of the initialisations that adapters have in common. notes: what was left out of the library.
    """
    counts = {status: sum(row.status == status for row in rows) for status in STATUSES}
    good = [row for row in rows if row.status in ("ok", "skipped")]
    converted = [row for row in rows if row.status == "ok"]
    before = sum(row.source_bytes or 0 for row in good)
    after = sum(row.bytes or 0 for row in good) + in_common
    errors = [row.relative_error for row in good if row.relative_error is not None]
    rate = 1 / seconds if seconds and converted else None
    return BatchSummary(
        schema_version=SCHEMA_VERSION,
        items=items,
        ok=counts["ok"],
        skipped=counts["skipped"],
        failed=counts["failed"],
        refused=counts["refused"],
        pending=items - len(rows),
        duplicates=sum(row.duplicate_of is not None for row in rows),
        bytes_before=before,
        bytes_after=after,
        bytes_in_common=in_common,
        byte_ratio=after / before if before else None,
        relative_error=_quantiles(errors),
        errors=dict(Counter(row.error for row in rows if row.error is not None)),
        seconds=seconds,
        adapters_per_second=len(converted) * rate if rate else None,
        source_bytes_per_second=sum(row.source_bytes or 0 for row in converted) * rate if rate else None,
        serving=serving([row.to_dict() for row in good]),
        bases=bases_of([row.to_dict() for row in good]),
        left_over=[],
        pruned=[],
        notes=list(notes),
        tool_version=__version__,
        run=run,
    )


def bases_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Adapters by what they call their base model, the most frequent first. rows: of a manifest."""
    said = Counter(str(row["settings"].get("base_model") or "unnamed") for row in rows)
    return dict(said.most_common())


def spread(values: Sequence[float]) -> dict[str, float] | None:
    """The least, median and largest; None of none."""
    return {"min": min(values), "p50": float(np.quantile(values, 0.5)), "max": max(values)} if values else None


def spread_of_behaviour(found: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How many adapters were measured, and how each measure spreads; None where none was. found: of `rows.behaviour_of`."""
    spreads = {name: spread([row[name] for row in found if row.get(name) is not None]) for name in BEHAVIOUR}
    return (
        {"measured": len(found), **{name: one for name, one in spreads.items() if one is not None}} if found else None
    )


def _quantiles(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"p50": float(np.quantile(values, 0.5)), "p95": float(np.quantile(values, 0.95)), "max": max(values)}
