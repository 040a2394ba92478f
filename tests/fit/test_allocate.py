"""Ranks from budgets: against brute force, against the linear-programming bound, and at the edges."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bslora_convert.fit import allocate

Spectra = dict[str, torch.Tensor]


@st.composite
def problems(draw: st.DrawFn) -> tuple[Spectra, dict[str, int], int]:
    names = [f"m{i}" for i in range(draw(st.integers(1, 4)))]
    energy = st.floats(0, 100, allow_nan=False)
    spectra = {
        name: torch.tensor(sorted(draw(st.lists(energy, min_size=1, max_size=4)), reverse=True), dtype=torch.float64)
        for name in names
    }
    costs = {name: draw(st.integers(1, 9)) for name in names}
    return spectra, costs, draw(st.integers(0, 60))


def bound(spectra: Spectra, costs: dict[str, int], budget: int) -> float:
    """Least lost energy when a component may be taken in part: no allocation is below it."""
    items = sorted(
        ((float(v), costs[n]) for n, values in spectra.items() for v in values), key=lambda item: -item[0] / item[1]
    )
    lost = sum(value for value, _ in items)
    for value, cost in items:
        share = min(1.0, budget / cost)
        lost -= value * share
        budget -= cost * share
        if budget <= 0:
            break
    return lost


@settings(max_examples=200, deadline=None)
@given(problems())
def test_within_budget_and_within_one_component_of_the_best(problem: tuple[Spectra, dict[str, int], int]) -> None:
    spectra, costs, budget = problem
    ranks = allocate.within_budget(spectra, costs, budget)
    lost = allocate.lost_energy(spectra, ranks)
    assert allocate.cost_of(ranks, costs) <= budget
    choices = [range(len(values) + 1) for values in spectra.values()]
    best = min(
        allocate.lost_energy(spectra, dict(zip(spectra, ranks_, strict=True)))
        for ranks_ in itertools.product(*choices)
        if sum(r * costs[n] for r, n in zip(ranks_, spectra, strict=True)) <= budget
    )
    largest = max(float(values[0]) for values in spectra.values())
    assert bound(spectra, costs, budget) <= best + 1e-9
    assert best - 1e-9 <= lost <= best + largest + 1e-9


@settings(max_examples=100, deadline=None)
@given(problems())
def test_within_energy_meets_the_target_with_no_spare_component(problem: tuple[Spectra, dict[str, int], int]) -> None:
    spectra, costs, share = problem
    target = sum(float(v.sum()) for v in spectra.values()) * share / 60
    ranks = allocate.within_energy(spectra, costs, target)
    assert allocate.lost_energy(spectra, ranks) <= target + 1e-9
    same_money = allocate.within_budget(spectra, costs, allocate.cost_of(ranks, costs))
    assert allocate.lost_energy(spectra, same_money) <= allocate.lost_energy(spectra, ranks) + 1e-9


def test_many_modules_come_within_a_thousandth_of_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    spectra = {
        f"m{i}": torch.sort(torch.rand(16, generator=generator, dtype=torch.float64) ** 4, descending=True)[0]
        for i in range(210)
    }
    costs = {name: (1152, 768, 2112)[i % 3] for i, name in enumerate(spectra)}
    for share in (0.4459, 0.25, 0.125):
        budget = int(share * 16 * sum(costs.values()))
        lost = allocate.lost_energy(spectra, allocate.within_budget(spectra, costs, budget))
        assert lost <= 1.001 * bound(spectra, costs, budget)


def test_components_paid_elsewhere_are_passed_over() -> None:
    spectra = {"a": torch.tensor([9.0, 4.0, 1.0]), "b": torch.tensor([8.0, 7.0])}
    ranks = allocate.within_budget(spectra, {"a": 1, "b": 1}, 2, first={"a": 1})
    assert ranks == {"a": 0, "b": 2}
    assert allocate.lost_energy(spectra, ranks, first={"a": 1}) == pytest.approx(5.0)


def test_uniform_is_the_largest_rank_that_fits() -> None:
    limits, costs = {"a": 2, "b": 8}, {"a": 10, "b": 1}
    assert allocate.uniform(limits, costs, 10) == {"a": 0, "b": 0}
    assert allocate.uniform(limits, costs, 22) == {"a": 2, "b": 2}
    assert allocate.uniform(limits, costs, 27) == {"a": 2, "b": 7}
    assert allocate.uniform(limits, costs, 10_000) == {"a": 2, "b": 8}


def test_zero_energy_takes_no_rank() -> None:
    spectra = {"zero": torch.zeros(4), "one": torch.tensor([1.0])}
    assert allocate.within_budget(spectra, {"zero": 1, "one": 1}, 10) == {"zero": 0, "one": 1}
