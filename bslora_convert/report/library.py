"""A library's page: the answer first, the size and error of every adapter, what failed and why."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bslora_convert.library.manifest import DONE
from bslora_convert.report import commands
from bslora_convert.report.environment import environment
from bslora_convert.report.plots import GRID, PART_COLOURS, STYLE, WIDE, picture
from bslora_convert.results.library import BatchSummary

FEW, APART = 4, 1.1  # adapters of a picture, and how far the largest is from the smallest, at least


def render(summary: BatchSummary, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of a library, from its summary and its manifest's rows."""
    good = sorted((row for row in rows if row["status"] in DONE), key=_worst_first)
    measured = [row for row in good if row.get("behaviour")]
    unmeasured = [row for row in good if not row.get("behaviour")]
    return environment().get_template("library.html").render(
        summary=summary,
        rows=good,
        measured=measured,
        bad=[row for row in rows if row["status"] not in DONE],
        today=datetime.now(UTC).date().isoformat(),
        command=commands.verify("THIS_DIR") if unmeasured else None,
        unmeasured=len(unmeasured),
        serve=commands.serve_library(summary, "THIS_DIR"),
        figures=_figures(good),
    )  # fmt: skip


def _worst_first(row: Mapping[str, Any]) -> tuple[float, float, str]:
    """By the effect kept, the least first, those that were not measured last; then by error, the largest first."""
    kept = (row.get("behaviour") or {}).get("retention")
    return math.inf if kept is None else kept, -(row["relative_error"] or 0.0), row["id"]


def _figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Error over size, where the adapters differ enough to be a picture."""
    shares = [row["bytes"] / row["source_bytes"] for row in rows]
    errors = [row["relative_error"] or 0.0 for row in rows]
    if len(rows) < FEW or max(shares) < APART * min(shares) or max(errors) < APART * min(errors):
        return {}
    return {"relative error over what is left of the bytes": picture(lambda width: _scatter(rows, width))}


def _scatter(rows: Sequence[Mapping[str, Any]], width: float) -> Figure:
    """Relative error over the share of the bytes that is left."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 3.6 if width == WIDE else 3.0), layout="constrained")
        axes = figure.add_subplot()
        sizes = [row["bytes"] / row["source_bytes"] for row in rows]
        axes.scatter(sizes, [row["relative_error"] for row in rows], s=22, alpha=0.6, color=PART_COLOURS["local"])
        axes.set_xlabel("compact file / source file")
        axes.set_ylabel("relative error of the weights")
        axes.set_xlim(0, 1.1 * max(sizes))
        axes.set_ylim(0, 1.15 * max(max(row["relative_error"] for row in rows), 1e-6))
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8 if width == WIDE else 4))
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        axes.grid(color=GRID, linewidth=0.6)
    return figure
