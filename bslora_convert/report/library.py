"""A library's page: the answer first, the size and error of every adapter, what failed and why."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bslora_convert.report import commands
from bslora_convert.report.environment import environment
from bslora_convert.report.plots import GRID, PART_COLOURS, STYLE, WIDE, picture
from bslora_convert.results.library import BatchSummary


def render(summary: BatchSummary, rows: Sequence[Mapping[str, Any]]) -> str:
    """The page of a batch, from its summary and its manifest's rows."""
    good = sorted(
        (row for row in rows if row["status"] in ("ok", "skipped")), key=lambda row: -(row["relative_error"] or 0.0)
    )
    return environment().get_template("library.html").render(
        summary=summary,
        rows=good,
        bad=[row for row in rows if row["status"] not in ("ok", "skipped")],
        command=commands.verify(f"THIS_DIR/{good[0]['id']}") if good else None,
        figures={"relative error over what is left of the bytes": picture(lambda width: _scatter(good, width))} if good else {},
    )  # fmt: skip


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
