"""comparison.html: error against size, a line a form, and the table behind it."""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from bslora_convert.comparison.winners import error, winners
from bslora_convert.report import advice
from bslora_convert.report.environment import environment
from bslora_convert.report.labels import LETTER, LINE
from bslora_convert.report.plots import NARROW, STYLE, WIDE, Picture, data_uri, log_ticks, save
from bslora_convert.results.analysis import Comparison, FormRow

PAGE = "comparison.html"
SLACK = 1.01  # of a size, for what a form stores beside its numbers
MARKS = "os^vD<>pPX*h"


def write(place: Path, record: Comparison) -> None:
    """The page, and its plots as SVG and PNG, into a directory."""
    drawn = figures(record)
    for name, (_, figure) in drawn.items():
        save(figure, place / name)
    narrow = figures(record, NARROW)
    page = environment().get_template(PAGE).render(
        record=record,
        best=_best(record),
        rows=ordered(record.rows),
        behaviour=record.has_behaviour,
        calls=advice.compress(record),
        command=None if record.has_behaviour else advice.compare(record),
        figures={
            title: Picture(data_uri(figure), data_uri(narrow[name][1])) for name, (title, figure) in drawn.items()
        },
    )  # fmt: skip
    (place / PAGE).write_text(page, encoding="utf-8")


def figures(record: Comparison, width: float = WIDE) -> dict[str, tuple[str, Figure]]:
    """Every plot that the record has the numbers for, in a width in inches: file name -> (title, figure)."""
    rows = record.rows
    drawn = {
        "error_by_size": (
            "relative error of the weights against size",
            _lines(rows, error, "relative error", width),
        )
    }
    if record.has_behaviour:
        drawn["kl_by_size"] = "KL to the original against size", _lines(rows, _kl, "KL, nats a token", width)
    return drawn


def _best(record: Comparison) -> dict[float, FormRow]:
    """The row of the lowest error at each size."""
    rows = {(row.budget, row.form): row for row in record.rows}
    return {budget: rows[budget, form] for budget, form in winners(record).items()}


def ordered(rows: Sequence[FormRow]) -> list[FormRow]:
    """By size asked for, the largest first, then by error; what is larger than asked for after those, what has no fit last."""

    def place(row: FormRow) -> tuple[float, bool, bool, float]:
        larger = row.byte_ratio is not None and row.byte_ratio > SLACK * row.budget
        return -row.budget, row.relative_error is None, larger, row.relative_error or 0.0

    return sorted(rows, key=place)


def _kl(row: FormRow) -> float | None:
    return None if row.kl is None else max(row.kl, 1e-7)


def _lines(rows: Sequence[FormRow], measure: Callable[[FormRow], float | None], title: str, width: float) -> Figure:
    """One line a form over the bytes that it takes, both axes logarithmic; the forms' names beside or below."""
    forms: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        value = measure(row)
        if value is not None and row.byte_ratio is not None:
            forms.setdefault(row.form, []).append((row.byte_ratio, value))
    narrow = width < WIDE
    high = 3.2 + LINE * math.ceil(len(forms) / 2) if narrow else max(5.4, LINE * (len(forms) + 2))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, high), layout="constrained")
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["tab10"]
        for index, (form, points) in enumerate(forms.items()):
            sizes, values = zip(*sorted(points), strict=True)
            ours = form in advice.CALLS
            axes.plot(sizes, values, marker=MARKS[index % len(MARKS)], label=form, color=colours(index % 10),
                      linewidth=1.6 if ours else 0.9, markersize=5, linestyle="-" if ours else "--")  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("share of the LoRA's bytes, %")
        axes.set_ylabel(title)
        log_ticks(axes.yaxis, *axes.get_ylim())
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        ticks = _apart({row.budget for row in rows}, 7 * LETTER / (width - (1.0 if narrow else 2.5)))
        axes.set_xticks(ticks, [f"{100 * share:.3g}" for share in ticks])
        axes.grid(alpha=0.25)
        if forms:
            place: dict[str, Any] = (
                {"loc": "outside lower center", "ncols": 2} if narrow else {"loc": "outside right center"}
            )
            figure.legend(frameon=False, fontsize=8, **place)
    return figure


def _apart(sizes: Collection[float], least: float) -> list[float]:
    """Those sizes, from the largest, that stand apart by a share of a logarithmic axis over all of them."""
    room = least * math.log(max(sizes) / min(sizes))
    chosen: list[float] = []
    for size in sorted(sizes, reverse=True):
        if not chosen or math.log(chosen[-1] / size) >= room:
            chosen.append(size)
    return chosen
