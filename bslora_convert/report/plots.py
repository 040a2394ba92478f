"""Plots as self-contained SVG, drawn with matplotlib's object interface (no global state, no display)."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, MUTED, GRID = "#1f2933", "#616e7c", "#e4e7eb"
PART_COLOURS = {"local": "#2f6f9f", "intra": "#e08e45", "inter": "#7a9e49"}
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


def data_uri(figure: Figure) -> str:
    """The figure as an SVG data URI, the same bytes for the same figure."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def error_map(
    errors: Mapping[tuple[str, str], float],
    layers: Sequence[str],
    kinds: Sequence[str],
    measure: str = "relative error",
) -> Figure:
    """A measure of each module: layers across, kinds down; blank where a layer has no such module."""
    grid = np.full((len(kinds), len(layers)), np.nan)
    for (layer, kind), value in errors.items():
        grid[kinds.index(kind), layers.index(layer)] = value
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.9 + 0.32 * len(kinds)), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(grid, aspect="auto", cmap="viridis_r", vmin=0, interpolation="nearest")
        step = max(1, len(layers) // 16)
        axes.set_xticks(range(0, len(layers), step), [layers[i] for i in range(0, len(layers), step)])
        axes.set_yticks(range(len(kinds)), kinds)
        axes.set_xlabel("layer")
        figure.colorbar(image, ax=axes, label=measure, pad=0.01)
    return figure


def spectra(by_kind: Mapping[str, np.ndarray], kept: Mapping[str, float]) -> Figure:
    """Energy left out after k components, median over the modules of a kind; a dot at the mean local rank."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")
        axes = figure.add_subplot()
        colours = [matplotlib.colormaps["tab10"](i) for i in range(10)]
        for index, (kind, left) in enumerate(by_kind.items()):
            colour = colours[index % len(colours)]
            axes.plot(range(len(left)), left, color=colour, linewidth=1.4, label=kind)
            at = kept[kind]
            axes.plot(at, np.interp(at, range(len(left)), left), "o", color=colour, markersize=4)
        axes.set_ylim(0, 1)
        axes.set_xlim(left=0)
        axes.set_xlabel("components kept")
        axes.set_ylabel("share of energy left out")
        axes.grid(color=GRID, linewidth=0.6)
        if by_kind:  # an adapter whose deltas are all zero has no spectrum
            axes.legend(fontsize=7, frameon=False, ncols=2)
    return figure


def budget_split(parameters: Mapping[str, int], components: Mapping[str, float]) -> Figure:
    """What each part costs and what it carries, both as shares of the result's total."""
    spent = sum(parameters.values()) or 1
    carried = sum(components.values()) or 1.0
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 1.7), layout="constrained")
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
        figure = Figure(figsize=(4.4, 1.2 + 0.24 * len(parts)), layout="constrained")
        axes = figure.add_subplot()
        left = np.zeros(len(parts))
        for width in [*coded[::-1], *([0] if 0 in used else [])]:
            share = np.array([by_part[part].get(str(width), 0) for part in parts]) / totals
            axes.barh(parts, share, left=left, height=0.7, label=str(width) if width else "left out",
                      color=colours.get(width, GRID))  # fmt: skip
            left += share
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the vectors, by bits a number")
        axes.legend(fontsize=7, frameon=False, ncols=7, loc="lower center", bbox_to_anchor=(0.5, 1.0),
                    columnspacing=0.9, handlelength=1.2)  # fmt: skip
    return figure


def training(steps: Sequence[int], losses: Sequence[float], heldout: Sequence[tuple[int, float]]) -> Figure:
    """Loss of each step and KL on the held-out rows, both in nats a token."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(steps, losses, color="#9aa5b1", linewidth=0.9, label="loss")
        axes.plot(*zip(*heldout, strict=True), "o-", color=PART_COLOURS["local"], markersize=3.5, label="held-out KL")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel("nats a token")
        axes.grid(color=GRID, linewidth=0.6)
        axes.legend(fontsize=8, frameon=False)
    return figure


def baselines(errors: Mapping[str, float]) -> Figure:
    """Relative error of the result and of plain SVD of the same size."""
    names = list(errors)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 1.7), layout="constrained")
        axes = figure.add_subplot()
        colours: list[Any] = [PART_COLOURS["local"], *["#9aa5b1"] * (len(names) - 1)]
        bars = axes.barh(names[::-1], [errors[name] for name in names[::-1]], color=colours[::-1], height=0.55)
        axes.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
        axes.set_xlim(0, 1.25 * max([*errors.values(), 1e-9]))  # room for the labels
        axes.set_xlabel("relative error, lower is better")
    return figure
