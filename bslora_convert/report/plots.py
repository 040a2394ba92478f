"""Plots as self-contained SVG, drawn with matplotlib's object interface (no global state, no display).

Error is shown in reds that darken with it; what is neither good nor bad, as a rank or a similarity, in blues. Backgrounds are
clear, so that a dark page can turn the inks around. What fills a page's width is drawn a second time for a phone's.
"""

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure

from bslora_convert.report.labels import LETTER, LINE, beside, every, tail

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
PART_COLOURS = {"local": "#2f6f9f", "intra": "#e08e45", "inter": "#7a9e49"}
WIDE, NARROW = 9.0, 4.4  # inches: a page's width, a phone's
ROWS = 40  # of a map, before its rows get lower
LEAST_RED = 0.1  # error that has the full red at least: a map of tiny errors stays pale
LEAST_BLUE = 0.05  # share of A at the darkest end of its map at least
STYLE: Any = {
    "svg.hashsalt": "bslora-convert",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "text.parse_math": False,  # a dollar in a name is a dollar
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot as data URIs: for any screen, and for a narrow one where that differs."""

    wide: str
    narrow: str | None = None


def data_uri(figure: Figure) -> str:
    """The figure as an SVG data URI with a clear background, the same bytes for the same figure."""
    figure.set_facecolor("none")
    for axes in figure.axes:
        axes.set_facecolor("none")
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def save(figure: Figure, path: Path) -> None:
    """The figure as an SVG and a PNG file of this name, the same bytes for the same figure."""
    with matplotlib.rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(path.with_suffix(".svg"), metadata={"Date": None})
        FigureCanvasAgg(figure).print_png(path.with_suffix(".png"), metadata={"Software": None})


def picture(draw: Callable[[float], Figure]) -> Picture:
    """A plot of the page's whole width, from what draws it in a width in inches."""
    return Picture(data_uri(draw(WIDE)), data_uri(draw(NARROW)))


def neutral() -> Colormap:
    """Blues for what is neither good nor bad; a grey where there is nothing."""
    shades = matplotlib.colormaps["Blues"](np.linspace(0.12, 1, 256))
    return ListedColormap(shades).with_extremes(bad=GRID)


def error_map(
    errors: Mapping[tuple[str, str], float], layers: Sequence[str], kinds: Sequence[str], width: float = WIDE
) -> Figure:
    """The relative error of each module, redder the larger: layers across, kinds down; grey where a layer has no such module."""
    reds = matplotlib.colormaps["YlOrRd"](np.linspace(0, 0.7, 256))  # ends in a red that stays one on a dark page
    most = max([LEAST_RED, *errors.values()])
    return _map(errors, layers, kinds, "relative error", ListedColormap(reds).with_extremes(bad=GRID), most, width)


def rank_map(
    ranks: Mapping[tuple[str, str], float], layers: Sequence[str], kinds: Sequence[str], width: float = WIDE
) -> Figure:
    """The effective rank of each module, in blues: layers across, kinds down; grey where a layer has no such module."""
    return _map(ranks, layers, kinds, "effective rank", neutral(), max([1.0, *ranks.values()]), width)


def change_map(
    shares: Mapping[tuple[str, str], float], layers: Sequence[str], kinds: Sequence[str], width: float = WIDE
) -> Figure:
    """How much of each A's energy training put in, in blues; grey where the initialisation is not known."""
    most = max([LEAST_BLUE, *shares.values()])
    return _map(shares, layers, kinds, "share of A that training changed", neutral(), most, width)


def _map(
    values: Mapping[tuple[str, str], float],
    layers: Sequence[str],
    kinds: Sequence[str],
    measure: str,
    colours: Colormap,
    most: float,
    width: float,
) -> Figure:
    grid = np.full((len(kinds), len(layers)), np.nan)
    for (layer, kind), value in values.items():
        grid[kinds.index(kind), layers.index(layer)] = value
    names = [tail(kind, int(5.5 * width)) for kind in kinds]
    high = 0.32 * min(len(kinds), ROWS)
    across, turned = beside(layers, width - LETTER * max(map(len, names), default=0) - 0.9)
    down = every(len(kinds), LINE, high)
    with matplotlib.rc_context(STYLE):
        below = LETTER * max(map(len, layers)) if turned else 0.0
        figure = Figure(figsize=(width, 0.9 + high + below), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(grid, aspect="auto", cmap=colours, vmin=0, vmax=most, interpolation="nearest")
        axes.set_xticks(across, [layers[i] for i in across], rotation=90 if turned else 0)
        axes.set_yticks(down, [names[i] for i in down])
        axes.set_xlabel("layer")
        figure.colorbar(image, ax=axes, label=measure, pad=0.01)
    return figure


def spectra(by_kind: Mapping[str, np.ndarray], kept: Mapping[str, float]) -> Figure:
    """Energy left out after k components, median over the modules of a kind; a dot at the mean local rank."""
    columns = 2 if max(map(len, by_kind), default=0) <= 24 else 1
    below = LINE * math.ceil(len(by_kind) / columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(NARROW, 2.9 + below), layout="constrained")
        axes = figure.add_subplot()
        colours = [matplotlib.colormaps["tab10"](i) for i in range(10)]
        for index, (kind, left) in enumerate(by_kind.items()):
            colour = colours[index % len(colours)]
            dashes = ("-", "--", ":")[index // len(colours) % 3]
            axes.plot(range(len(left)), left, color=colour, linewidth=1.4, linestyle=dashes, label=tail(kind, 48))
            at = kept[kind]
            axes.plot(at, np.interp(at, range(len(left)), left), "o", color=colour, markersize=4)
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True))
        axes.set_xlabel("components kept; dots at the rank that is local")
        axes.set_ylabel("share of energy left out")
        axes.grid(color=GRID, linewidth=0.6)
        if by_kind:  # an adapter whose deltas are all zero has no spectrum
            figure.legend(fontsize=8, frameon=False, ncols=columns, loc="outside lower center")
    return figure


def budget_split(parameters: Mapping[str, int], components: Mapping[str, float]) -> Figure:
    """What each part costs and what it carries, both as shares of the result's total."""
    spent = sum(parameters.values()) or 1
    carried = sum(components.values()) or 1.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(NARROW, 1.7), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(2)
        for part, colour in PART_COLOURS.items():
            widths = np.array([components.get(part, 0.0) / carried, parameters.get(part, 0) / spent])
            axes.barh(["energy", "parameters"], widths, left=left, color=colour, label=part, height=0.55)
            left += widths
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the result")
        axes.legend(fontsize=8, frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def widths(by_part: Mapping[str, Mapping[str, int]]) -> Figure:
    """Share of the vectors of each part that is coded in each width; width 0 is left out of the file."""
    used = sorted({int(width) for counts in by_part.values() for width in counts})
    parts = list(by_part)[::-1]
    totals = np.array([sum(by_part[part].values()) or 1 for part in parts])
    coded = [width for width in used if width]
    shades = matplotlib.colormaps["YlGnBu"](np.linspace(0.25, 1, len(coded)))
    colours = dict(zip(coded, shades, strict=True))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(NARROW, 1.4 + 0.24 * len(parts)), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(parts))
        for width in [*coded[::-1], *([0] if 0 in used else [])]:
            share = np.array([by_part[part].get(str(width), 0) for part in parts]) / totals
            axes.barh(parts, share, left=left, height=0.7, label=str(width) if width else "left out",
                      color=colours.get(width, "#cbd2d9"))  # fmt: skip
            left += share
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the vectors, by bits a number")
        figure.legend(fontsize=8, frameon=False, ncols=len(used), loc="outside upper center",
                      columnspacing=0.7, handlelength=1.0)  # fmt: skip
    return figure


def training(steps: Sequence[int], losses: Sequence[float], heldout: Sequence[tuple[int, float]]) -> Figure:
    """Loss of each step and KL on the held-out rows, both in nats a token."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(NARROW, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, losses, color="#9aa5b1", linewidth=0.9, label="loss")
        axes.plot(*zip(*heldout, strict=True), "o-", color=PART_COLOURS["local"], markersize=3.5, label="held-out KL")
        axes.set_yscale("log")
        log_ticks(axes.yaxis, *axes.get_ylim())
        axes.set_xlabel("step")
        axes.set_ylabel("nats a token")
        axes.grid(color=GRID, linewidth=0.6)
        axes.legend(fontsize=8, frameon=False)
    return figure


def baselines(errors: Mapping[str, float]) -> Figure:
    """Relative error of the result and of plain SVD of the same size."""
    names = list(errors)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(NARROW, 1.7), layout="constrained")
        axes = figure.add_subplot()
        colours: list[Any] = [PART_COLOURS["local"], *["#9aa5b1"] * (len(names) - 1)]
        bars = axes.barh(names[::-1], [errors[name] for name in names[::-1]], color=colours[::-1], height=0.55)
        axes.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
        axes.set_xlim(0, 1.35 * max([*errors.values(), 1e-9]))  # room for the labels
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4))
        axes.set_xlabel("relative error, lower is better")
    return figure


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Ticks of a logarithmic axis over this range: plain numbers, as many as have room."""
    decades = math.log10(high / low) if 0 < low < high else 0.0
    ticker = matplotlib.ticker
    if decades < 0.5:
        axis.set_major_locator(ticker.MaxNLocator(5))
    elif decades < 3:
        subs = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1, 3)
        axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
    else:
        axis.set_major_locator(ticker.LogLocator())
    axis.set_major_formatter("{x:.4g}")
    axis.set_minor_locator(ticker.NullLocator())
