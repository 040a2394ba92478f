"""The whole fit: planted forms come back, the objective never rises, budgets hold, GT is truncated SVD."""

import pytest
import torch

from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice
from bslora_convert.errors import RecipeError
from bslora_convert.fit import allocate
from bslora_convert.fit.convert import (
    Fit,
    Source,
    fit_by_hand,
    fit_to_budget,
    measure,
)
from bslora_convert.modules.factors import Factors
from bslora_convert.recipe.structure import Structure
from tests.planting import KINDS, Product, deltas_of, plant, random_products


def dense_error(source: Source, form: BsloraForm) -> float:
    """‖ΔW − ΔŴ‖ / ‖ΔW‖ formed densely in float64."""
    lost = energy = 0.0
    for name, delta in source.deltas.items():
        factors, kept = delta.factors(), form.delta(name)
        matrix = factors.b.double() @ factors.a.double()
        lost += float((matrix - kept.b.double() @ kept.a.double()).square().sum())
        energy += float(matrix.square().sum())
    return (lost / energy) ** 0.5


PLANTED = [
    pytest.param(Kronecker(16), {"shared_size": 16}, (1, 1), id="ke"),
    pytest.param(Kronecker(20), {"shared_size": 20}, (1, 1), id="ke-cut-edges"),
    pytest.param(Slice(128, 128), {}, (1, 1), id="ss"),
    pytest.param(Slice(128, 128, "top-left"), {"slice": "top-left"}, (1, 1), id="ss-top-left"),
    pytest.param(Slice(128, 128, "bottom-right"), {"slice": "bottom-right"}, (1, 1), id="ss-bottom-right"),
    pytest.param(Gate(32), {"shared_size": 32}, (1, 1), id="gt"),
]


@pytest.mark.parametrize(("transform", "options", "kernel_ranks"), PLANTED)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_planted_forms_come_back_at_their_own_ranks(
    transform: Kronecker | Slice | Gate, options: dict[str, object], kernel_ranks: tuple[int, int], seed: int
) -> None:
    form = plant(transform, (2, 4, 8), layers=4, seed=seed, kernel_ranks=kernel_ranks)
    source = measure(deltas_of(form))
    fit = fit_by_hand(source, Structure(transform.name, local_ranks="uniform", **options), (2, 4, 8))
    assert dense_error(source, fit.form) < 1e-4
    assert fit.form.parameters == form.parameters


@pytest.mark.parametrize("kernel", ["1_r", "2_r"])
def test_planted_kernel_variants_come_back(kernel: str) -> None:
    pair_rank = {"1_r": 1, "2_r": 2}[kernel]
    form = plant(Kronecker(8), (2, pair_rank, pair_rank), layers=4, seed=2, kernel_ranks=(2, 3))
    source = measure(deltas_of(form))
    fit = fit_by_hand(source, Structure("ke", shared_size=8, kernel=kernel, local_ranks="uniform"), (2, 2, 3))
    assert dense_error(source, fit.form) < 1e-4


def test_planted_in_float64_comes_back_to_rounding() -> None:
    form = plant(Kronecker(16), (2, 4, 8), layers=6, dtype=torch.float64)
    fit = fit_by_hand(measure(deltas_of(form)), Structure("ke", shared_size=16, local_ranks="uniform"), (2, 4, 8))
    assert fit.lost <= 1e-12 * sum(p.held.b.norm() ** 2 * p.held.a.norm() ** 2 for p in deltas_of(form).values())


@pytest.mark.parametrize("transform", ["ke", "ss"])
@pytest.mark.parametrize("planted", [True, False])
def test_the_objective_never_rises(transform: str, planted: bool) -> None:
    shape = Kronecker(16) if transform == "ke" else Slice(128, 128)
    products = deltas_of(plant(shape, layers=3)) if planted else random_products(layers=3)
    source = measure(products)
    options = Structure(transform, shared_size=16 if transform == "ke" else None, local_ranks="uniform")
    fit = fit_by_hand(source, options, (2, 2, 3))
    assert len(fit.history) > 1
    floor = 1e-10 * source.energy
    assert all(
        later <= earlier * (1 + 1e-9) + floor for earlier, later in zip(fit.history, fit.history[1:], strict=False)
    )
    assert (fit.lost / source.energy) ** 0.5 == pytest.approx(dense_error(source, fit.form), abs=1e-5)


@pytest.mark.parametrize("local", [0, 1, 3, 6])
def test_gate_equals_truncated_svd_of_rank_plus_two(local: int) -> None:
    source = measure(random_products(rank=8))
    gated = fit_by_hand(source, Structure("gt", shared_size=16, local_ranks="uniform"), (local, 1, 1))
    svd = fit_by_hand(source, Structure("none", local_ranks="uniform"), (local + 2, 0, 0))
    assert dense_error(source, gated.form) == pytest.approx(dense_error(source, svd.form), abs=1e-6)
    exact = sum(
        float(torch.linalg.svdvals(p.held.b.double() @ p.held.a.double())[local + 2 :].square().sum())
        for p in random_products(rank=8).values()
    )
    assert dense_error(source, gated.form) == pytest.approx((exact / source.energy) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("transform", ["none", "ke", "ss", "gt", "auto"])
@pytest.mark.parametrize("share", [0.4459, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.8, 0.25))])
@pytest.mark.parametrize("uniform", [False, True])
def test_never_above_the_budget(transform: str, share: float, uniform: bool) -> None:
    kinds = {name: (4 * out, 4 * width) for name, (out, width) in KINDS.items()}
    source = measure(random_products(rank=16, kinds=kinds))
    budget = int(share * source.parameters)
    fit = fit_to_budget(source, Structure(transform, local_ranks="uniform" if uniform else "adaptive"), budget)
    assert 0 < fit.form.parameters <= budget
    assert (fit.lost / source.energy) ** 0.5 == pytest.approx(dense_error(source, fit.form), abs=1e-5)


def baseline(source: Source, parameters: int) -> float:
    limits = {name: len(values) for name, values in source.spectra.items()}
    ranks = allocate.uniform(limits, source.costs, parameters)
    return (allocate.lost_energy(source.spectra, ranks) / source.energy) ** 0.5


@pytest.mark.parametrize("share", [0.25, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.4459, 0.125))])
def test_none_ke_and_auto_beat_uniform_svd_of_the_same_size(share: float) -> None:
    kinds = {name: (4 * out, 4 * width) for name, (out, width) in KINDS.items()}
    products = {
        name: Product(Factors(p.held.b * (1 + i % 5), p.held.a))
        for i, (name, p) in enumerate(random_products(rank=16, kinds=kinds, layers=4).items())
    }
    source = measure(products)
    budget = int(share * source.parameters)
    fits = {name: fit_to_budget(source, Structure(name), budget) for name in ("none", "ke", "auto")}
    for fit in fits.values():
        assert dense_error(source, fit.form) <= baseline(source, fit.form.parameters) + 1e-6
    assert fits["auto"].lost <= fits["none"].lost


@pytest.mark.parametrize(
    ("name", "size"), [pytest.param("auto", 32, marks=pytest.mark.slow), ("ke", 128)]
)  # at 128 growing alone overshoots intra
def test_the_search_finds_planted_ranks_at_the_planted_size(name: str, size: int) -> None:
    kinds = {name: (4 * out, 4 * width) for name, (out, width) in KINDS.items()}
    form = plant(Kronecker(size), (2, 4, 8), layers=4, kinds=kinds)
    source = measure(deltas_of(form))
    options = Structure(name, shared_size=size)
    fit = fit_to_budget(source, options, form.parameters)
    assert fit.form.transform is not None
    assert fit.form.transform.name == "ke"
    assert (fit.form.shared_rank("intra"), fit.form.shared_rank("inter")) == (4, 8)
    assert fit.form.parameters <= form.parameters
    assert dense_error(source, fit.form) < 1e-3, name


def test_auto_falls_back_to_none_where_nothing_is_shared() -> None:
    source = measure(random_products(rank=8))
    budget = int(0.5 * source.parameters)
    none = fit_to_budget(source, Structure("none"), budget)
    auto = fit_to_budget(source, Structure("auto"), budget)
    assert auto.lost <= none.lost
    assert any("auto compared" in note for note in auto.notes)


def test_minimum_ranks_are_kept_by_name_and_dropped_by_choice() -> None:
    source = measure(random_products(rank=8))
    budget = int(0.5 * source.parameters)
    for name in ("ke", "ss", "gt"):
        form = fit_to_budget(source, Structure(name, min_shared=1), budget).form
        assert form.shared_rank("intra") >= 1
        assert form.shared_rank("inter") >= 1
        dropped = fit_to_budget(source, Structure(name, min_shared=0), budget)
        assert dropped.lost <= fit_to_budget(source, Structure("none"), budget).lost * (1 + 1e-12)


def test_a_budget_below_the_least_form_says_what_is_needed() -> None:
    source = measure(random_products(rank=4))
    for name in ("ke", "ss", "gt"):
        with pytest.raises(RecipeError, match="raise --budget"):
            fit_to_budget(source, Structure(name), 100)


def test_modules_outside_of_layers_stay_local() -> None:
    products = random_products(rank=4)
    generator = torch.Generator().manual_seed(1)
    products["lm_head"] = Product(
        Factors(torch.randn(97, 4, generator=generator), torch.randn(4, 64, generator=generator))
    )
    source = measure(products)
    for name in ("ke", "ss", "gt"):
        form = fit_by_hand(source, Structure(name, local_ranks="uniform"), (2, 1, 1)).form
        assert form.modules["lm_head"].paths == {}
        assert form.modules["lm_head"].local.rank == 2
        assert set(form.modules["model.layers.0.mlp.up_proj"].paths) == {"intra", "inter"}


def test_encoder_and_decoder_layers_are_different_layers() -> None:
    products = {
        name.replace("model.layers", stack): product
        for stack in ("encoder.block", "decoder.block")
        for name, product in random_products(rank=4).items()
    }
    form = fit_by_hand(measure(products), Structure("ke", local_ranks="uniform"), (1, 1, 1)).form
    assert set(form.shared["intra"]) == {f"{s}.block.{i}" for s in ("encoder", "decoder") for i in (0, 1)}
    assert len(form.shared["inter"]) == 1


def test_adapters_without_layers_are_fitted_plainly() -> None:
    products = {"lm_head": Product(Factors(torch.randn(30, 4), torch.randn(4, 20)))}
    for name in ("ke", "ss", "gt", "auto"):
        fit = fit_to_budget(measure(products), Structure(name), 100)
        assert fit.form.transform is None
        assert fit.form.parameters == 100


def same(first: Fit, second: Fit) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.form.tensors(), second.form.tensors(), strict=True))


@pytest.mark.parametrize("transform", ["ke", "ss", "gt", "none"])
def test_the_same_seed_gives_the_same_numbers(transform: str) -> None:
    options = Structure(transform)
    source = measure(random_products())
    budget = int(0.6 * source.parameters)
    assert same(fit_to_budget(source, options, budget), fit_to_budget(measure(random_products()), options, budget))
    assert fit_to_budget(source, options, budget, seed=4).form.parameters <= budget


@pytest.mark.parametrize("transform", ["ke", "ss", "none"])
def test_gauge_changes_nothing(transform: str) -> None:
    """A -> G A, B -> B G^-1: another LoRA, the same deltas, the same fit."""
    generator = torch.Generator().manual_seed(5)
    moved = {}
    for name, product in random_products(rank=6).items():
        g = torch.eye(6) + 0.3 * torch.randn(6, 6, generator=generator)
        moved[name] = Product(Factors(product.held.b @ torch.linalg.inv(g), g @ product.held.a))
    options = Structure(transform, local_ranks="uniform")
    ranks = (2, 1, 1) if transform != "none" else (2, 0, 0)
    first = fit_by_hand(measure(random_products(rank=6)), options, ranks)
    second = fit_by_hand(measure(moved), options, ranks)
    assert first.lost == pytest.approx(second.lost, rel=2e-3)
    if transform == "none":
        for name in first.form.modules:
            a, b = first.form.delta(name), second.form.delta(name)
            assert torch.allclose(a.b @ a.a, b.b @ b.a, atol=1e-3)
