"""Widths within a number of bits, the refit, and the bound that nothing can pass."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from bslora_convert.bslora.codes.widths import WIDTHS
from bslora_convert.coding import rate
from bslora_convert.coding.allocation import Items
from bslora_convert.coding.encode import code_pair
from bslora_convert.coding.form import code_form
from bslora_convert.fit.convert import fit_to_budget, measure
from bslora_convert.modules.factors import Factors
from bslora_convert.recipe.structure import Structure
from bslora_convert.recipe.target import Target
from tests.planting import random_products

IN_CODES = Target(bytes=0, unbiased=False)  # the bits are given beside it


def random_items(seed: int) -> Items:
    random = np.random.default_rng(seed)
    bits = np.sort(random.integers(1, 30, (4, 4)), 1).astype(float)
    bits[:, 0] = 0
    return Items(bits, -np.sort(-random.random((4, 4)), 1))


@pytest.mark.parametrize("seed", range(20))
def test_no_choice_of_as_many_bits_is_better_by_more_than_one_step(seed: int) -> None:
    items, budget = random_items(seed), 35
    hull = items.hull()
    chosen = hull.within_bits(budget)
    assert chosen is not None
    assert hull.bits_at(chosen) <= budget

    def sum_at(values: np.ndarray, options: np.ndarray) -> float:
        return float(values[np.arange(4), options].sum())

    every = [np.array(options) for options in itertools.product(range(4), repeat=4)]
    best = min(sum_at(items.lost, options) for options in every if sum_at(items.bits, options) <= budget)
    step = float((items.lost[:, :-1] - items.lost[:, 1:]).max())
    lost = sum_at(items.lost, hull.options_at(chosen))
    assert best - 1e-12 <= lost <= best + step
    for allowed in np.linspace(best, items.lost[:, 0].sum(), 7):
        fewest = hull.within_loss(allowed)
        assert hull.energies_at(fewest).sum() <= max(allowed, hull.energies_at(hull.finest).sum()) + 1e-12
    for price in np.geomspace(1e-4, 1, 25):  # every Lagrangian choice is met on the way
        wanted = np.argmin(items.lost + price * items.bits, 1)
        met = hull.within_bits(int(sum_at(items.bits, wanted)))
        assert met is not None
        assert sum_at(items.lost, hull.options_at(met)) <= sum_at(items.lost, wanted) + 1e-12


def test_a_budget_below_everything_is_told() -> None:
    items = Items(np.array([[5.0, 9.0]]), np.array([[1.0, 0.0]]))
    assert items.hull().within_bits(4) is None
    assert items.hull().within_bits(9) is not None


def test_the_refit_never_rises_and_equals_dense() -> None:
    generator = torch.Generator().manual_seed(0)
    target = Factors(torch.randn(40, 6, generator=generator), torch.randn(6, 30, generator=generator))
    u, s, v = torch.linalg.svd(target.b @ target.a)
    start = Factors(u[:, :4] * s[:4].sqrt(), s[:4].sqrt()[:, None] * v[:4])
    for widths in ([4, 3, 2, 1], [2, 2, 2, 2], [16, 8, 4, 1]):
        pair = code_pair(target, start, [((0, width), (0, width)) for width in widths])
        made = pair.factors()
        dense = float((target.b.double() @ target.a.double() - made.b.double() @ made.a.double()).square().sum())
        assert pair.lost == pytest.approx(dense, rel=1e-5)
        assert pair.b.rest.coded.widths.tolist() == pair.a.rest.coded.widths.tolist() == widths


@pytest.mark.parametrize("transform", ["none", "ke", "ss", "gt"])
@pytest.mark.parametrize("share", [0.4, 0.1])
def test_a_form_in_codes_keeps_its_bits_and_beats_sixteen_of_them(transform: str, share: float) -> None:
    source = measure(random_products(rank=8, layers=2, decay=0.7))
    budget = int(share * 16 * source.parameters)
    form = fit_to_budget(source, Structure(transform), min(source.parameters, int(4 * share * source.parameters))).form
    coded = code_form(source, form, IN_CODES, torch.float32, bits=budget)
    assert coded.bits <= budget
    assert coded.form.transform == form.transform
    dense = sum(
        float(
            (d.held.b.double() @ d.held.a.double() - (f := coded.form.delta(n)).b.double() @ f.a.double())
            .square()
            .sum()
        )
        for n, d in source.deltas.items()
    )
    assert coded.lost == pytest.approx(dense, rel=1e-4)
    sixteen = fit_to_budget(source, Structure("none"), budget // 16)
    assert coded.lost < sixteen.lost
    assert coded.lost > rate.bound(source.spectra, source.costs, budget)


def test_one_width_and_given_ranks() -> None:
    source = measure(random_products(rank=8, layers=2))
    form = fit_to_budget(source, Structure("none"), source.parameters // 2).form
    ranks = {name: module.local.rank for name, module in form.modules.items()}
    last = None
    for width in WIDTHS:
        coded = code_form(source, form, replace(IN_CODES, bytes=None, numbers=0, width=width), torch.float32)
        assert {name: module.local.rank for name, module in coded.form.modules.items()} == ranks
        assert {int(w) for tensor in coded.tensors.values() for w in tensor.widths} == {width}
        assert last is None or coded.lost < last
        last = coded.lost


def test_an_error_is_reached_in_few_bits() -> None:
    source = measure(random_products(rank=8, layers=2))
    form = fit_to_budget(source, Structure("none"), source.parameters).form
    allowed = 0.1 * source.energy
    coded = code_form(source, form, IN_CODES, torch.float32, lost=allowed)
    assert coded.lost <= allowed * 1.02
    fewer = code_form(source, form, IN_CODES, torch.float32, bits=int(0.9 * coded.bits))
    assert fewer.lost > allowed


def test_the_bound_is_that_of_one_component() -> None:
    spectra, costs = {"m": torch.tensor([2.0])}, {"m": 100}
    for bits in (50.0, 100.0, 400.0):
        d = 2 ** (-2 * bits / 100)
        line = 2.0 * (1 - (1 - d) ** 2)
        assert rate.bound(spectra, costs, bits) <= 2.0
        if line < 1.5:
            assert rate.bound(spectra, costs, bits) == pytest.approx(line, rel=1e-3)
    assert rate.bound(spectra, costs, 0.0) == 2.0
