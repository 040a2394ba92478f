"""comparison.html: error against size, a line a form, and the table behind it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bslora_convert.comparison.winners import winners
from bslora_convert.report.page import environment
from bslora_convert.report.plots import STYLE, data_uri

PAGE = "comparison.html"
MARKS = "os^vD<>pPX*h"


def write(place: Path, record: Mapping[str, Any]) -> None:
    """The page, and its plots as SVG and PNG, into a directory."""
    drawn = {
        "error_by_size": (
            "relative error of the weights against size",
            _lines(record["rows"], _error, "relative error"),
        )
    }
    if any(row["functional"] for row in record["rows"]):
        drawn["kl_by_size"] = "KL to the original against size", _lines(record["rows"], _kl, "KL, nats a token")
    for name, (_, figure) in drawn.items():
        with matplotlib.rc_context(STYLE):
            FigureCanvasSVG(figure).print_svg(place / f"{name}.svg", metadata={"Date": None})
            FigureCanvasAgg(figure).print_png(place / f"{name}.png", metadata={"Software": None})
    page = environment().get_template(PAGE).render(
        record=record,
        best=winners(record),
        rows=ordered(record["rows"]),
        behaviour=any(row["functional"] for row in record["rows"]),
        figures={title: data_uri(figure) for title, figure in drawn.values()},
    )  # fmt: skip
    (place / PAGE).write_text(page, encoding="utf-8")


def ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By size asked for, the largest first, then by error; what could not be fitted last."""
    return sorted(rows, key=lambda row: (-row["budget"], row["relative_error"] is None, row["relative_error"] or 0.0))


def _error(row: Mapping[str, Any]) -> float | None:
    value: float | None = row["relative_error"]
    return value


def _kl(row: Mapping[str, Any]) -> float | None:
    return max(float(row["functional"]["kl"]), 1e-7) if row["functional"] else None


def _lines(rows: Sequence[Mapping[str, Any]], measure: Any, title: str) -> Figure:
    """One line a form over the bytes that it takes, both axes logarithmic."""
    forms: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value = measure(row)
        if value is not None:
            forms.setdefault(row["form"], []).append((row["byte_ratio"], value))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5.4), layout="constrained")
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["tab20"]
        for index, (form, points) in enumerate(forms.items()):
            sizes, values = zip(*sorted(points), strict=True)
            ours = form.startswith(("svd", "bslora"))
            axes.plot(sizes, values, marker=MARKS[index % len(MARKS)], label=form, color=colours(index % 20),
                      linewidth=1.6 if ours else 0.9, markersize=5, linestyle="-" if ours else "--")  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("share of the LoRA's bytes, %")
        axes.set_ylabel(title)
        axes.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%.2g"))
        ticks = sorted({row["budget"] for row in rows})
        axes.set_xticks(ticks, [f"{100 * share:.3g}" for share in ticks])
        axes.grid(alpha=0.25, which="both")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    return figure
