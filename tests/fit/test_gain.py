"""Unbiased updates, against dense float64: as strong as the original's wherever something of the module's own can be scaled."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from bslora_convert import Recipe, compress, load_compact, load_lora
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice
from bslora_convert.cli import main
from bslora_convert.errors import RecipeError
from bslora_convert.fit.convert import fit_by_hand, measure
from bslora_convert.fit.gain import LARGEST, Strength, unbiased
from bslora_convert.modules.factors import Factors
from bslora_convert.recipe.structure import Structure
from tests.conftest import FIXTURES
from tests.fit.test_in_metric import metrics_of, samples, widths
from tests.planting import plant, random_products

TINY = FIXTURES / "tiny" / "gsm8k"


def dense(factors: Factors) -> Tensor:
    return factors.b.double() @ factors.a.double()


@pytest.mark.parametrize("two_sided", [None, False, True])
@pytest.mark.parametrize("transform", ["none", "ke", "gt", "ss"])
def test_every_module_is_as_strong_as_the_original(transform: str, two_sided: bool | None) -> None:
    deltas = random_products(layers=2, rank=6)
    metrics = {}
    if two_sided is not None:
        inputs, gradients = samples(widths(deltas, 1), 0), samples(widths(deltas, 0), 1)
        metrics = metrics_of(deltas, inputs, gradients if two_sided else None)
    source = measure(deltas, metrics=metrics)
    ranks = (2, 0, 0) if transform == "none" else (2, 1, 2)
    before = fit_by_hand(source, Structure(transform, local_ranks="uniform"), ranks).form
    after = unbiased(source, before)
    for name, delta in deltas.items():
        metric = source.metric(name)
        target, found = dense(metric.weighed(delta.factors())), dense(metric.weighed(after.delta(name)))
        assert float((target * found).sum() / target.square().sum()) == pytest.approx(1, abs=1e-3)
        was = dense(metric.weighed(before.delta(name)))
        assert float((target * was).sum() / target.square().sum()) < 1


@pytest.mark.parametrize("transform", [Kronecker(32), Gate(16), Slice(128, 128)])
def test_a_carrier_scales_the_whole_path(transform: Any) -> None:
    form: BsloraForm = plant(transform, (1, 2, 1), layers=1)
    name = next(iter(form.modules))
    for level, path in form.modules[name].paths.items():
        term = transform.factors(form.pair(level, path.group), path.own, form.modules[name].shape)
        if transform.carrier is None:
            assert not path.own
            continue
        own = {**path.own, transform.carrier: 3 * path.own[transform.carrier]}
        scaled = transform.factors(form.pair(level, path.group), own, form.modules[name].shape)
        assert float((dense(scaled) - 3 * dense(term)).norm()) < 1e-6 * float(dense(scaled).norm())


def test_scales_have_bounds() -> None:
    assert Strength(1.0, 0.5).scale == 2
    assert Strength(1.0, 0.01).scale == LARGEST
    assert Strength(1.0, 0.0).scale == Strength(1.0, -0.2).scale == Strength(0.0, 0.0).scale == 1
    assert Strength(1.0, 0.9995).scale == 1  # finer than the numbers are
    assert Strength(1.0, 0.5, fixed=0.25).scale == 1.5


@pytest.mark.parametrize(
    "options",
    [
        {"transform": "none", "bytes": 0.1},
        pytest.param({"transform": "ke", "bytes": 0.1}, marks=pytest.mark.slow),
        {"transform": "ke", "ranks": (2, 1, 1), "bits": 3},
        {"transform": "gt", "ranks": (2, 1, 1), "bits": 6},
        {"transform": "ke", "budget": 0.3},
        {"transform": "none", "budget": 0.3, "dtype": "bfloat16"},
    ],
)
def test_what_is_written_is_unbiased_and_the_record_says_so(tmp_path: Path, options: dict[str, Any]) -> None:
    records = {
        gain: compress(TINY, tmp_path / gain, Recipe(gain=gain, **options), report_html=False)
        for gain in ("unbiased", "least-squares")
    }
    source, least_form, form = (
        load_lora(TINY),
        load_compact(tmp_path / "least-squares").form,
        load_compact(tmp_path / "unbiased").form,
    )
    chosen = "bytes" in options  # then bits are spent where behaviour is, not where the error of the weights is
    along = energy = 0.0
    for name, module in source.modules.items():
        target = dense(module.factors())
        least, found = (float((target * dense(one.delta(name))).sum()) for one in (least_form, form))
        along, energy = along + found, energy + float(target.square().sum())
        strength = found / float(target.square().sum())
        if chosen:  # in full, or by the most that is allowed: ‖ΔŴ‖² / ⟨ΔW, ΔŴ⟩ is by how much; a module may be left out
            size = float(dense(form.delta(name)).square().sum())
            near = (
                0.95 if options["transform"] == "none" else 0.9
            )  # coded shared parts are no least squares of their own
            assert strength == pytest.approx(1, abs=4e-3) or size >= near * LARGEST * found
        else:
            expected = min(1, LARGEST * least / float(target.square().sum()))
            assert strength == pytest.approx(expected, abs=4e-3)
    assert records["unbiased"]["weight"]["gain"] == pytest.approx(along / energy, abs=1e-6)
    assert records["unbiased"]["weight"]["gain"] > 0.95
    least = records["least-squares"]["weight"]
    assert least["gain"] < records["unbiased"]["weight"]["gain"]
    assert least["relative_error"] < records["unbiased"]["weight"]["relative_error"]
    assert least["gain"] == pytest.approx(least["energy_kept"], abs=0.02)
    sizes = [records[gain]["compact"]["bytes"] for gain in ("unbiased", "least-squares")]
    assert sizes[0] == pytest.approx(sizes[1], rel=2e-3) if chosen else sizes[0] == sizes[1]
    for row in records["unbiased"]["baselines"].values():
        assert row["relative_error"] <= row["unbiased_error"]


def test_an_error_is_that_of_what_is_written(tmp_path: Path) -> None:
    for gain in ("unbiased", "least-squares"):
        record = compress(TINY, tmp_path / gain, Recipe(transform="none", max_error=0.5, gain=gain), report_html=False)
        assert 0.45 < record["weight"]["relative_error"] <= 0.5


def test_the_baseline_beside_it_is_dense_svd_unbiased(tmp_path: Path) -> None:
    record = compress(TINY, tmp_path / "out", Recipe(transform="none", budget=0.25), report_html=False)
    lost = energy = 0.0
    rank = int(record["baselines"]["svd_uniform"]["parameter_ratio"] * 8)
    for module in load_lora(TINY).modules.values():
        target = dense(module.factors())
        u, s, v = torch.linalg.svd(target, full_matrices=False)
        kept = (u[:, :rank] * s[:rank]) @ v[:rank]
        scale = min(float(target.square().sum() / (target * kept).sum()), LARGEST)
        lost += float((target - scale * kept).square().sum())
        energy += float(target.square().sum())
    assert record["baselines"]["svd_uniform"]["unbiased_error"] == pytest.approx((lost / energy) ** 0.5, rel=1e-4)


def test_the_option_stands_in_a_recipe_and_on_the_command_line(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('transform = "none"\nbudget = 0.3\ngain = "least-squares"\n')
    call = ["compress", str(TINY), str(tmp_path / "a"), "--recipe", str(recipe), "--json", "--no-report-html"]
    record = json.loads(CliRunner().invoke(main, call).stdout)
    assert record["recipe"]["gain"] == "least-squares"
    record = json.loads(
        CliRunner().invoke(main, [*call[:2], str(tmp_path / "b"), *call[3:], "--gain", "unbiased"]).stdout
    )
    assert record["recipe"]["gain"] == "unbiased" == Recipe().to_dict()["gain"] and record["weight"]["gain"] > 0.97
    with pytest.raises(RecipeError, match="gain is 'much': one of unbiased, least-squares"):
        Recipe(gain="much")
