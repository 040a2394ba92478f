"""analysis.html and its plots: is there anything to share, seen at a glance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from bslora_convert.modules.names import kind_of, layer_of
from bslora_convert.report import commands
from bslora_convert.report.environment import environment
from bslora_convert.report.labels import LETTER, LINE, beside, every, short_layers, tail
from bslora_convert.report.plots import (
    INK,
    MUTED,
    NARROW,
    PART_COLOURS,
    STYLE,
    WIDE,
    Picture,
    data_uri,
    neutral,
    rank_map,
    save,
)
from bslora_convert.results.analysis import Analysis

PAGE = "analysis.html"
WHOLE = ("shared_energy", "effective_rank")  # plots that fill the page's width
NAMES = {"ke": "Kronecker", "ss": "slice", "gt": "gate"}


def write(place: Path, record: Analysis) -> None:
    """The page, and every plot of it as SVG and PNG, into a directory."""
    drawn = figures(record)
    for name, (_, figure) in drawn.items():
        save(figure, place / name)
    narrow = {name: figure for name, (_, figure) in figures(record, NARROW).items() if name in WHOLE}
    shown = {
        title: Picture(data_uri(figure), data_uri(narrow[name]) if name in narrow else None)
        for name, (title, figure) in drawn.items()
    }
    page = environment().get_template(PAGE).render(
        record=record, names=NAMES, figures=shown, command=None if record.activations else commands.analyze(record)
    )  # fmt: skip
    (place / PAGE).write_text(page, encoding="utf-8")


def figures(record: Analysis, width: float = WIDE) -> dict[str, tuple[str, Figure]]:
    """Every plot that the record has the numbers for: file name -> (title, figure); width: inches of those that fill a page."""
    found: dict[str, tuple[str, Figure]] = {}
    if record.shared_energy:
        found["shared_energy"] = (
            "what one shared factor explains; a mark for chance, with two standard deviations",
            _shared_energy(record.shared_energy, width),
        )
        layers = record.groups["layers"]
        order = [name for members in layers["clusters"] for name in members]
        place = [layers["names"].index(name) for name in order]
        similarity = np.array(layers["similarity"])[np.ix_(place, place)]
        found["similarity_layers"] = (
            "similarity of layers, by cluster",
            _square(similarity, short_layers(order), "similarity", -1),
        )
    if record.rmi_across["layers"]:
        labels = short_layers(record.rmi_across["layers"])
        matrix = np.array(record.rmi_across["matrix"])
        found["rmi_across"] = "entropy similarity across layers", _square(matrix, labels, "RMI", 0)
        kinds, mean = _mean_within(record.rmi_within)
        found["rmi_within"] = "entropy similarity within layers, their mean", _square(mean, kinds, "RMI", 0)
    shown = record.activations
    if shown and shown["rmi_across"]["layers"]:
        found["rmi_activations"] = (
            "entropy similarity of what layers put out",
            _square(np.array(shown["rmi_across"]["matrix"]), short_layers(shown["rmi_across"]["layers"]), "RMI", 0),
        )
    found["effective_rank"] = "effective rank by module", _rank_map(record.modules, width)
    return found


def _square(matrix: np.ndarray, labels: Sequence[str], measure: str, low: float) -> Figure:
    """A symmetric matrix as a heat map, blue; brown below zero."""
    names = [tail(label, 16) for label in labels]
    room = 3.4 - LETTER * max(map(len, names))
    across, turned = beside(names, room)
    down = every(len(names), LINE, room)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.0), layout="constrained")
        axes = figure.add_subplot()
        colours = matplotlib.colormaps["BrBG"] if low < 0 else neutral()
        image = axes.imshow(matrix, cmap=colours, vmin=low, vmax=1, interpolation="nearest")
        axes.set_xticks(across, [names[i] for i in across], rotation=90 if turned else 0)
        axes.set_yticks(down, [names[i] for i in down])
        figure.colorbar(image, ax=axes, label=measure, pad=0.02, shrink=0.85)
    return figure


def _shared_energy(energies: Mapping[str, Mapping[str, Mapping[str, Any]]], width: float) -> Figure:
    """Bars of the share explained, a mark for the mean of chance with two standard deviations."""
    rows = [(transform, level, row) for transform, levels in energies.items() for level, row in levels.items()]
    rows = [row for row in rows if row[0] != "gt"]
    narrow = width < WIDE
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 0.8 + (0.55 if narrow else 0.4) * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, (_, level, row) in enumerate(rows):
            axes.barh(place, row["energy"], height=0.55, color=PART_COLOURS[level])
            axes.errorbar(
                row["null_mean"], place, xerr=2 * row["null_std"], fmt="|", color=INK, markersize=16, capsize=3
            )
            text = f"{row['energy']:.2%}, chance {row['null_mean']:.2%}"
            text += f"\nz = {row['z']:.1f}" if narrow else f", z = {row['z']:.1f}"
            end = max(row["energy"], row["null_mean"] + 2 * row["null_std"])
            axes.annotate(text, (end, place), (8, 0), textcoords="offset points", va="center", color=MUTED, fontsize=8)
        where = {"intra": "one per layer", "inter": "one for all"}
        mark = ",\n" if narrow else ", "
        axes.set_yticks(
            range(len(rows)), [f"{NAMES[t]}{mark}{where[level]}, rank {row['rank']}" for t, level, row in rows]
        )
        axes.invert_yaxis()
        axes.set_xlim(0, (2.9 if narrow else 1.6) * max(max(row["energy"], row["null_mean"]) for *_, row in rows))
        axes.set_xlabel("share of the adapter's energy")
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(4 if narrow else 8))
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return figure


def _rank_map(modules: Sequence[Mapping[str, Any]], width: float) -> Figure:
    """Effective rank: layers across, kinds down."""
    shown = short_layers([layer_of(module["name"]) for module in modules])
    kinds = [kind_of(module["name"]) for module in modules]
    ranks = [module["effective_rank"] for module in modules]
    grid = dict(zip(zip(shown, kinds, strict=True), ranks, strict=True))
    return rank_map(grid, list(dict.fromkeys(shown)), list(dict.fromkeys(kinds)), width)


def _mean_within(layers: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], np.ndarray]:
    """Mean over the layers that have the commonest set of kinds."""
    sets = [tuple(layer["kinds"]) for layer in layers.values()]
    commonest = max(dict.fromkeys(sets), key=sets.count)
    chosen = [np.array(layer["matrix"]) for layer in layers.values() if tuple(layer["kinds"]) == commonest]
    return [kind.rpartition(".")[2] for kind in commonest], np.mean(chosen, axis=0)
