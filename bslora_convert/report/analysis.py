"""analysis.html and its plots: is there anything to share, seen at a glance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bslora_convert.modules.names import kind_of, layer_of
from bslora_convert.report.page import environment
from bslora_convert.report.plots import MUTED, PART_COLOURS, STYLE, data_uri, error_map

PAGE = "analysis.html"
NAMES = {"ke": "Kronecker", "ss": "slice", "gt": "gate"}


def write(place: Path, record: Mapping[str, Any]) -> None:
    """The page, and every plot of it as SVG and PNG, into a directory."""
    drawn = figures(record)
    for name, (_, figure) in drawn.items():
        with matplotlib.rc_context(STYLE):
            FigureCanvasSVG(figure).print_svg(place / f"{name}.svg", metadata={"Date": None})
            FigureCanvasAgg(figure).print_png(place / f"{name}.png", metadata={"Software": None})
    page = environment().get_template(PAGE).render(
        record=record, names=NAMES, figures={title: data_uri(figure) for title, figure in drawn.values()}
    )  # fmt: skip
    (place / PAGE).write_text(page, encoding="utf-8")


def figures(record: Mapping[str, Any]) -> dict[str, tuple[str, Figure]]:
    """Every plot that the record has the numbers for: file name -> (title, figure)."""
    found: dict[str, tuple[str, Figure]] = {}
    if record["shared_energy"]:
        found["shared_energy"] = (
            "what one shared factor explains, beside chance",
            _shared_energy(record["shared_energy"]),
        )
        layers = record["groups"]["layers"]
        order = [name for members in layers["clusters"] for name in members]
        place = [layers["names"].index(name) for name in order]
        similarity = np.array(layers["similarity"])[np.ix_(place, place)]
        found["similarity_layers"] = (
            "similarity of layers, by cluster",
            _square(similarity, _short(order), "similarity", -1),
        )
    if record["rmi_across"]["layers"]:
        labels = _short(record["rmi_across"]["layers"])
        matrix = np.array(record["rmi_across"]["matrix"])
        found["rmi_across"] = "entropy similarity across layers", _square(matrix, labels, "RMI", 0)
        kinds, mean = _mean_within(record["rmi_within"])
        found["rmi_within"] = "entropy similarity within layers, their mean", _square(mean, kinds, "RMI", 0)
    if "activations" in record and record["activations"]["rmi_across"]["layers"]:
        shown = record["activations"]
        found["rmi_activations"] = (
            "entropy similarity of what layers put out",
            _square(np.array(shown["rmi_across"]["matrix"]), _short(shown["rmi_across"]["layers"]), "RMI", 0),
        )
    found["effective_rank"] = "effective rank by module", _rank_map(record["modules"])
    return found


def _square(matrix: np.ndarray, labels: Sequence[str], measure: str, low: float) -> Figure:
    """A symmetric matrix as a heat map."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.0), layout="constrained")
        axes = figure.add_subplot()
        colours = "RdBu_r" if low < 0 else "viridis"
        image = axes.imshow(matrix, cmap=colours, vmin=low, vmax=1, interpolation="nearest")
        step = max(1, len(labels) // 12)
        positions = range(0, len(labels), step)
        axes.set_xticks(positions, [labels[i] for i in positions], rotation=90)
        axes.set_yticks(positions, [labels[i] for i in positions])
        figure.colorbar(image, ax=axes, label=measure, pad=0.02)
    return figure


def _shared_energy(energies: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Bars of the share explained, a mark for the mean of chance with two standard deviations."""
    rows = [(transform, level, row) for transform, levels in energies.items() for level, row in levels.items()]
    rows = [row for row in rows if row[0] != "gt"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.8 + 0.4 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, (_, level, row) in enumerate(rows):
            axes.barh(place, row["energy"], height=0.55, color=PART_COLOURS[level])
            axes.errorbar(
                row["null_mean"], place, xerr=2 * row["null_std"], fmt="|", color="#1f2933", markersize=16, capsize=3
            )
            text = f" {row['energy']:.2%}, chance {row['null_mean']:.2%}, z = {row['z']:.1f}"
            axes.text(max(row["energy"], row["null_mean"] + 2 * row["null_std"]), place, text, va="center", color=MUTED)
        where = {"intra": "one per layer", "inter": "one for all"}
        axes.set_yticks(range(len(rows)), [f"{NAMES[t]}, {where[level]}, rank {row['rank']}" for t, level, row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.9 * max(max(row["energy"], row["null_mean"]) for *_, row in rows))
        axes.set_xlabel("share of the adapter's energy")
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def _rank_map(modules: Sequence[Mapping[str, Any]]) -> Figure:
    """Effective rank: layers across, kinds down."""
    layers = {module["name"]: layer_of(module["name"]) or "–" for module in modules}
    short = dict(zip(layers, _short(list(layers.values())), strict=True))
    grid = {(short[m["name"]], kind_of(m["name"])): m["effective_rank"] for m in modules}
    kinds = list(dict.fromkeys(kind_of(module["name"]) for module in modules))
    return error_map(grid, list(dict.fromkeys(short.values())), kinds, "effective rank")


def _mean_within(layers: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], np.ndarray]:
    """Mean over the layers that have the commonest set of kinds."""
    sets = [tuple(layer["kinds"]) for layer in layers.values()]
    commonest = max(dict.fromkeys(sets), key=sets.count)
    chosen = [np.array(layer["matrix"]) for layer in layers.values() if tuple(layer["kinds"]) == commonest]
    return [kind.rpartition(".")[2] for kind in commonest], np.mean(chosen, axis=0)


def _short(layers: Sequence[str]) -> list[str]:
    """Numbers alone where all layers have one prefix."""
    prefixes = {layer.rpartition(".")[0] for layer in layers if layer != "–"}
    return [layer.rpartition(".")[2] or layer if len(prefixes) <= 1 else layer for layer in layers]
