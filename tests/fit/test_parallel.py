"""Work over cores: in order, at most a few at a time, errors and thread counts intact, the same numbers."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from bslora_convert.fit.convert import fit_to_budget, measure
from bslora_convert.fit.parallel import AHEAD, each, modules_over_cores
from bslora_convert.recipe.structure import Structure
from tests.planting import random_products


@pytest.fixture(params=[1, 2, 3])
def cores(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    with modules_over_cores():
        assert torch.get_num_threads() == 1
        yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_results_come_in_the_order_of_the_items(cores: int) -> None:
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item == 0 else 0)
        return item * item

    assert list(each(slow_first, range(20))) == [item * item for item in range(20)]


def test_only_a_few_items_are_in_flight(cores: int) -> None:
    taken: list[int] = []
    before = threading.active_count()  # what other tests have left

    def items() -> Iterator[int]:
        for item in range(100):
            taken.append(item)
            yield item

    results = each(lambda item: item, items())
    assert next(results) == 0
    assert len(taken) <= AHEAD * cores
    assert threading.active_count() <= before + cores
    results.close()


def test_an_error_is_raised_where_its_result_would_come(cores: int) -> None:
    def fails(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = each(fails, range(10))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        list(results)


@pytest.mark.parametrize("transform", ["none", "ke", "ss", "gt"])
def test_fits_are_the_same_bytes_on_any_number_of_cores(transform: str) -> None:
    def fit(cores: int) -> list[torch.Tensor]:
        torch.set_num_threads(cores)
        try:
            with modules_over_cores():
                source = measure(random_products(layers=3))
                return list(fit_to_budget(source, Structure(transform), source.parameters // 2).form.tensors())
        finally:
            torch.set_num_threads(1)

    assert all(torch.equal(one, three) for one, three in zip(fit(1), fit(3), strict=True))


def test_work_within_work_is_done_in_place() -> None:
    torch.set_num_threads(2)
    with modules_over_cores():
        sums = list(each(lambda item: sum(each(lambda inner: inner * item, range(4))), range(10)))
    torch.set_num_threads(1)
    assert sums == [6 * item for item in range(10)]
