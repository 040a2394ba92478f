"""Steps of the mixtures: each is the optimum that it claims, none raises the objective."""

from itertools import pairwise

import pytest
import torch

from bslora_convert.baselines.vector_bank import Mixing, assign, clusters, exchanged, farthest, starts, update_bank
from tests.baselines.planted import drawn


def left(x: torch.Tensor, mixing: Mixing, bank: torch.Tensor) -> torch.Tensor:
    return (x - mixing.of(bank)).square().sum(1)


@pytest.mark.parametrize("size", [2, 5, 40])
def test_no_step_raises_the_objective(size: int) -> None:
    random = drawn(size)
    x, weights = random(90, 16).double(), random(90).double().exp()
    bank = farthest(x, weights, size)
    mixing, residual = assign(x, bank, None)
    history = [float((weights * residual).sum())]
    for _ in range(5):
        assert torch.allclose(residual, left(x, mixing, bank), atol=1e-9)
        bank = update_bank(x, weights, mixing, bank)
        history.append(float((weights * left(x, mixing, bank)).sum()))
        mixing, residual = assign(x, bank, mixing)
        history.append(float((weights * residual).sum()))
        assert float(mixing.share.min()) >= 0
        assert float(mixing.share.max()) <= 1
        assert (mixing.first != mixing.second).all()
    assert all(after <= before * (1 + 1e-12) for before, after in pairwise(history))
    assert float(mixing.larger_first().share.min()) >= 0.5
    assert torch.allclose(mixing.larger_first().of(bank), mixing.of(bank))
    assert exchanged(x, weights, mixing, bank, residual).shape == bank.shape


def test_a_small_bank_is_searched_well() -> None:
    """Against all pairs, the share of each on a fine grid."""
    random = drawn(1)
    x, bank = random(60, 4).double(), random(6, 4).double()
    _, residual = assign(x, bank, None)
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)[:, None, None, None]
    pairs = grid * bank[:, None] + (1 - grid) * bank
    best = torch.cdist(x, pairs.reshape(-1, 4)).square().min(1).values
    assert float(residual.sum()) <= 1.02 * float(best.sum())


def test_as_many_vectors_as_pieces_hold_them_exactly() -> None:
    random = drawn(2)
    x, weights = random(70, 8).double(), torch.ones(70, dtype=torch.float64)
    _, residual = assign(x, farthest(x, weights, 71), None)
    assert float(residual.max()) < 1e-12


def test_starts_are_the_same_for_a_seed() -> None:
    random = drawn(3)
    x, weights = random(50, 8), torch.ones(50)
    assert torch.equal(clusters(x, weights, 7, 1), clusters(x, weights, 7, 1))
    assert [bank.shape for bank in starts(x, weights, 7, 1)] == [(7, 8), (7, 8)]
