"""SVD through Gram matrices against dense float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bslora_convert.modules.factors import Factors, add
from bslora_convert.modules.lowrank import Grams, gram, inner, product_svd, residual_energy


def product(out: int, width: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(
        torch.randn(out, rank, generator=generator, dtype=dtype),
        torch.randn(rank, width, generator=generator, dtype=dtype),
    )


def dense(factors: Factors) -> torch.Tensor:
    return factors.b.double() @ factors.a.double()


def best_error(matrix: torch.Tensor, rank: int) -> float:
    return float(torch.linalg.svdvals(matrix)[rank:].square().sum().sqrt())


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    width=st.integers(1, 40),
    rank=st.integers(1, 12),
    kept=st.integers(0, 12),
    seed=st.integers(0, 10_000),
)
def test_truncation_equals_dense_svd(out: int, width: int, rank: int, kept: int, seed: int) -> None:
    factors = product(out, width, rank, seed)
    svd = product_svd(Grams.of(factors))
    matrix = dense(factors)
    short = svd.truncate([factors], kept)
    error = float((matrix - dense(short)).norm())
    assert short.rank <= kept
    assert error == pytest.approx(best_error(matrix, kept), abs=1e-7 * float(matrix.norm()))
    values = torch.linalg.svdvals(matrix)
    found = svd.energies.sqrt()
    assert torch.allclose(found[: len(values)], values[: len(found)], atol=1e-7 * float(values[0]))


def test_float32_factors_lose_no_more_than_their_rounding() -> None:
    factors = product(300, 200, 16, 0, torch.float32)
    for kept in (1, 5, 15, 16):
        short = product_svd(Grams.of(factors)).truncate([factors], kept)
        error = float((dense(factors) - dense(short)).norm())
        assert error == pytest.approx(best_error(dense(factors), kept), abs=1e-6 * float(dense(factors).norm()))


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_gauge_invariance(condition: float) -> None:
    """A -> G A, B -> B G^-1 leaves the product, so it must leave its truncation."""
    factors = product(60, 50, 8, 1)
    u, v = (torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0] for _ in range(2))
    g = u @ torch.diag(torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), 8, dtype=torch.float64)) @ v
    moved = Factors(factors.b @ torch.linalg.inv(g), g @ factors.a)
    for kept in (1, 3, 7):
        first = dense(product_svd(Grams.of(factors)).truncate([factors], kept))
        second = dense(product_svd(Grams.of(moved)).truncate([moved], kept))
        assert torch.allclose(first, second, atol=1e-7 * float(first.norm()))


def test_a_diagonal_gauge_of_any_size_changes_nothing() -> None:
    factors = product(60, 50, 8, 1)
    d = torch.logspace(-12, 12, 8, dtype=torch.float64)
    moved = Factors(factors.b / d, d[:, None] * factors.a)
    first = dense(product_svd(Grams.of(factors)).truncate([factors], 3))
    second = dense(product_svd(Grams.of(moved)).truncate([moved], 3))
    assert torch.allclose(first, second, atol=1e-8 * float(first.norm()))


def test_dependent_rows_and_ranks_above_the_matrix() -> None:
    narrow = product(5, 4, 9, 2)
    svd = product_svd(Grams.of(narrow))
    assert torch.allclose(dense(svd.truncate([narrow], 9)), dense(narrow), atol=1e-6)
    twice = Factors(torch.cat([narrow.b, narrow.b], 1), torch.cat([narrow.a, narrow.a], 0))
    assert torch.allclose(dense(product_svd(Grams.of(twice)).truncate([twice], 4)), 2 * dense(narrow), atol=1e-6)


def test_zero_and_rankless_products() -> None:
    zero = Factors(torch.zeros(6, 3), torch.randn(3, 5))
    svd = product_svd(Grams.of(zero))
    assert float(svd.energies.sum()) == 0
    assert torch.equal(dense(svd.truncate([zero], 2)), torch.zeros(6, 5, dtype=torch.float64))
    nothing = Factors(torch.zeros(6, 0), torch.zeros(0, 5))
    assert product_svd(Grams.of(nothing)).truncate([nothing], 2).shape == (6, 5)


def test_truncation_of_a_sum_needs_no_concatenation() -> None:
    first, second = product(30, 20, 4, 3), product(30, 20, 2, 4)
    difference = add(first, Factors(-second.b, second.a))
    short = product_svd(Grams.of(difference)).truncate([first, Factors(-second.b, second.a)], 3)
    assert float((dense(difference) - dense(short)).norm()) == pytest.approx(best_error(dense(difference), 3), rel=1e-9)


def test_factors_are_balanced() -> None:
    factors = product(40, 30, 6, 5)
    short = product_svd(Grams.of(factors)).truncate([factors], 4)
    assert torch.allclose(short.b.norm(dim=0), short.a.norm(dim=1), rtol=1e-9)


def test_energies_and_inner_products() -> None:
    first, second = product(40, 30, 6, 6), product(40, 30, 3, 7)
    grams = Grams.of(first)
    assert grams.energy == pytest.approx(float(dense(first).square().sum()))
    assert inner(first, second) == pytest.approx(float((dense(first) * dense(second)).sum()))
    lost = residual_energy(first, grams, second)
    assert lost == pytest.approx(float((dense(first) - dense(second)).square().sum()))
    assert residual_energy(first, grams, first) <= 1e-13 * grams.energy


def test_gram_of_many_rows_is_summed_in_chunks() -> None:
    tall = torch.randn(200_000, 2)
    assert torch.allclose(gram(tall), tall.double().T @ tall.double(), rtol=1e-12)
    assert gram(tall).dtype == torch.float64
