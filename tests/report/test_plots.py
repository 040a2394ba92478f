"""Plots: labels that don't touch at either width, reds for error, other colours for what is neither good nor bad."""

import itertools
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bslora_convert.report import analysis, comparison, plots
from bslora_convert.report.labels import OUTSIDE, beside, short_layers
from bslora_convert.results.analysis import Comparison, FormRow
from tests.records import blank

KINDS = [f"mlp.{kind}_proj" for kind in ("gate", "up", "down")]


def crossing(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of tick labels of an axis that lie on each other."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    found = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() + axis.get_minor_ticks() if low <= tick.get_loc() <= high]
            boxes = [(tick.label1, tick.label1.get_window_extent()) for tick in ticks if tick.label1.get_text()]
            shown = [(text.get_text(), box) for text, box in boxes if text.get_visible()]
            found += [(a, b) for (a, first), (b, second) in itertools.combinations(shown, 2) if first.overlaps(second)]
    return found


def beyond(figure: Figure) -> bool:
    """Whether something of the figure is cut off."""
    FigureCanvasAgg(figure).draw()
    inside, all_ = figure.bbox_inches, figure.get_tightbbox()
    return bool(all_.x0 < -0.05 or all_.y0 < -0.05 or all_.x1 > inside.x1 + 0.05 or all_.y1 > inside.y1 + 0.05)


def grid(layers: list[str], kinds: list[str]) -> dict[tuple[str, str], float]:
    return {(layer, kind): 0.5 for layer in layers for kind in kinds}


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        ([str(i) for i in range(4)], KINDS),
        pytest.param([str(i) for i in range(31)], KINDS, marks=pytest.mark.slow),
        ([str(i) for i in range(126)], KINDS),
        ([f"encoder.{i}" for i in range(12)] + [f"decoder.{i}" for i in range(12)], KINDS),
        ([f"vision_model.{i}" for i in range(24)] + [OUTSIDE], [*KINDS, "a.long.name.of.a.module.outside.of.layers"]),
        pytest.param(
            [str(i) for i in range(32)],
            [f"mlp.experts.{i}.{kind}" for i in range(128) for kind in ("up", "down")],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_labels_of_maps_do_not_touch(layers: list[str], kinds: list[str], width: float) -> None:
    for draw in (plots.error_map, plots.rank_map):
        figure = draw(grid(layers, kinds), layers, kinds, width)
        assert crossing(figure) == []
        assert not beyond(figure)
        assert figure.get_figheight() < 18


def row(form: str, budget: float, error: float, kl: float) -> FormRow:
    return blank(FormRow, form=form, budget=budget, byte_ratio=budget, relative_error=error, functional={"kl": kl})


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
@pytest.mark.parametrize(
    ("lowest", "forms"),
    [
        (0.27, 14),
        (0.03, 14),
        *(pytest.param(*values, marks=pytest.mark.slow) for values in ((0.2, 14), (0.009, 60), (1e-5, 14))),
    ],
)
def test_labels_of_comparisons_do_not_touch(lowest: float, forms: int, width: float) -> None:
    budgets = (0.5, 0.49, 0.25, 0.125, 0.12, 0.1)
    errors = np.geomspace(lowest, 0.28, len(budgets))
    rows = [
        row(f"a_form_{i}", budget, float(error), float(error) ** 2)
        for i in range(forms)
        for budget, error in zip(budgets, errors, strict=True)
    ]
    for _, figure in comparison.figures(blank(Comparison, rows=rows), width).values():
        assert crossing(figure) == []
        assert not beyond(figure)
        shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert not any("$" in label for label in shown)
        low, high = figure.axes[0].get_ylim()
        assert sum(low <= place <= high for place in figure.axes[0].get_yticks()) >= 2


@pytest.mark.parametrize("losses", [(2.0, 1.9), (2.0, 0.5), (5.0, 0.00003)])
def test_labels_of_a_training_do_not_touch(losses: tuple[float, float]) -> None:
    figure = plots.training(range(1, 50), np.geomspace(*losses, 49).tolist(), [(0, losses[0]), (49, losses[1])])
    assert crossing(figure) == []


@pytest.mark.parametrize("width", [plots.WIDE, plots.NARROW])
def test_labels_of_shared_energy_stay_inside(width: float) -> None:
    level: Mapping[str, Any] = {"rank": 16, "energy": 0.2233, "null_mean": 0.2183, "null_std": 0.01, "z": 45.8}
    energies = {name: {"intra": level, "inter": {**level, "energy": 0.01}} for name in ("gt", "ke", "ss")}
    figure = analysis._shared_energy(energies, width)
    assert crossing(figure) == []
    assert not beyond(figure)
    axes = figure.axes[0]
    FigureCanvasAgg(figure).draw()
    assert all(text.get_window_extent().x1 <= axes.get_window_extent().x1 + 2 for text in axes.texts)


def test_a_legend_of_many_kinds_stands_outside_of_the_plot() -> None:
    kinds = {f"mlp.kind_{i}_proj": np.linspace(1, 0, 9) for i in range(20)}
    figure = plots.spectra(kinds, dict.fromkeys(kinds, 3.0))
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())
    assert figure.axes[0].get_window_extent().height > 150
    assert not beyond(figure)


def test_error_is_red_and_rank_is_not() -> None:
    errors, ranks = (draw(grid(["0"], KINDS), ["0"], KINDS) for draw in (plots.error_map, plots.rank_map))
    (red,), (blue,) = errors.axes[0].images, ranks.axes[0].images
    assert red.cmap.name != blue.cmap.name or not np.allclose(red.cmap(0.5), blue.cmap(0.5))
    steps = np.linspace(0, 1, 20)
    light = red.cmap(steps)[:, :3] @ [0.299, 0.587, 0.114]
    assert (np.diff(light) < 0).all()  # darker with every step
    assert all(r > max(g, b) - 0.01 for r, g, b, _ in red.cmap(steps))
    assert all(b >= r for r, _, b, _ in blue.cmap(steps))
    assert red.get_clim()[0] == 0
    tiny = plots.error_map({("0", "a"): 0.001}, ["0"], ["a"]).axes[0].images[0]
    assert tiny.get_clim() == (0, 0.1)  # what hardly errs is not shown in full red


def test_backgrounds_are_clear_and_no_formula_is_printed() -> None:
    figure = plots.baselines({"this": 0.2, "that": 0.3})
    assert plots.data_uri(figure) == plots.data_uri(plots.baselines({"this": 0.2, "that": 0.3}))
    assert matplotlib.colors.to_rgba(figure.get_facecolor())[3] == 0


def test_layers_are_shown_by_what_tells_them_apart() -> None:
    assert short_layers(["model.layers.0", "model.layers.1", None]) == ["0", "1", OUTSIDE]
    assert short_layers(["model.encoder.layers.0", "model.decoder.layers.0"]) == ["encoder.0", "decoder.0"]
    assert short_layers(["layers.0", "model.layers.0"]) == ["layers.0", "model.0"]
    assert short_layers([]) == []


def test_labels_that_fit_are_all_there() -> None:
    assert beside(["0", "1", "2"], 5.0) == (range(0, 3, 1), False)
    places, turned = beside([f"encoder.{i}" for i in range(20)], 5.0)
    assert turned
    assert len(places) == 20
    assert len(beside([str(i) for i in range(100)], 3.0)[0]) < 20
