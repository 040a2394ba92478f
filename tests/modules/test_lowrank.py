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


# ---------------------------------------------------------------------------------------------- numerical rank


def nudged(x: torch.Tensor, seed: int) -> torch.Tensor:
    """Every number one step up, one down or left, as another processor might round it."""
    step = torch.randint(-1, 2, x.shape, generator=torch.Generator().manual_seed(seed))
    up, down = torch.nextafter(x, torch.full_like(x, torch.inf)), torch.nextafter(x, torch.full_like(x, -torch.inf))
    return torch.where(step > 0, up, torch.where(step < 0, down, x))


def held_at(rank: int, of: Factors, seed: int) -> Factors:
    """The product in factors of a higher inner size, computed in float32."""
    mixed = torch.randn(of.rank, rank, generator=torch.Generator().manual_seed(seed))
    return Factors(of.b @ mixed, torch.linalg.pinv(mixed) @ of.a)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("planted", "held"), [(1, 6), (3, 6), (5, 16), (12, 40)])
def test_the_rank_is_that_of_what_was_planted_however_it_was_rounded(planted: int, held: int, seed: int) -> None:
    factors = held_at(held, product(72, 60, planted, seed, torch.float32), seed)
    for again in range(4):
        moved = Factors(nudged(factors.b, again), nudged(factors.a, again + 10)) if again else factors
        svd = product_svd(Grams.of(moved))
        assert len(svd.energies) == planted
        assert float((dense(moved) - dense(svd.truncate([moved], held))).norm()) < 1e-5 * float(dense(moved).norm())


@pytest.mark.parametrize("seed", range(6))
def test_a_sum_of_products_has_the_rank_of_its_sum(seed: int) -> None:
    """Terms that cancel leave rounding, which is no rank."""
    first, second = product(64, 48, 4, seed, torch.float32), product(64, 48, 3, seed + 50, torch.float32)
    turned, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)))
    minus = Factors(-first.b @ turned, turned.T @ first.a)
    for terms, rank in (((first, second), 7), ((first, second, minus), 3), ((first, minus), 0)):
        together = terms[0]
        for term in terms[1:]:
            together = add(together, term)
        for again in range(3):
            moved = Factors(nudged(together.b, again), nudged(together.a, again + 10))
            assert len(product_svd(Grams.of(moved)).energies) == rank


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_storing_in_16_bits_made_of_an_update_counts(dtype: torch.dtype) -> None:
    low, high = product(72, 8, 3, 0, torch.float32), product(8, 60, 8, 1, torch.float32)
    stored = Factors((low.b @ low.a).to(dtype), high.a.to(dtype))
    assert len(product_svd(Grams.of(stored)).energies) == 8


def test_a_weak_component_counts_as_far_as_its_numbers_carry_it() -> None:
    columns, rows = (
        torch.linalg.qr(torch.randn(n, 4, generator=torch.Generator().manual_seed(n)))[0] for n in (72, 60)
    )
    for weakest, rank, dtype in ((1e-5, 4, torch.float32), (1e-7, 3, torch.float32), (1e-7, 4, torch.float64)):
        sizes = torch.tensor([1.0, 0.5, 0.25, weakest], dtype=dtype)
        mixed, _ = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1), dtype=dtype))
        factors = Factors((columns.to(dtype) * sizes) @ mixed, mixed.T @ rows.T.to(dtype))
        assert len(product_svd(Grams.of(factors)).energies) == rank


def test_a_product_of_zeros_keeps_its_inner_size() -> None:
    zero = Factors(torch.zeros(6, 3), torch.randn(3, 5))
    assert len(product_svd(Grams.of(zero)).energies) == 3
    part = Factors(torch.cat([torch.ones(6, 1), torch.zeros(6, 2)], 1), zero.a)
    assert len(product_svd(Grams.of(part)).energies) == 1
