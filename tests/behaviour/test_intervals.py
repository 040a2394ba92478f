"""Intervals over rows: against a resampling loop written out, at their edges, and against what is known of a mean."""

import numpy as np
import pytest

from bslora_convert.behaviour.intervals import at_least, at_most, few_words, resampled_sums, two_sided
from bslora_convert.behaviour.prompts import Example, Row
from bslora_convert.behaviour.rows import RowSums, means, resampled_means


def some_rows(count: int, seed: int = 0) -> list[RowSums]:
    generator = np.random.default_rng(seed)
    rows = []
    for line in range(1, count + 1):
        tokens = int(generator.integers(1, 40))
        kl, base_kl = generator.exponential(0.01, tokens), generator.exponential(0.5, tokens)
        agreed = int((generator.random(tokens) < 0.9).sum())
        rows.append(RowSums(example(line, tokens), tokens, float(kl.sum()), float(base_kl.sum()), agreed))
    return rows


def example(line: int, tokens: int) -> Example:
    return Example(Row(line, ({"role": "user", "content": "x"},), "y"), tuple(range(tokens + 1)), 1, False)


def test_they_are_what_a_loop_over_resamples_gives() -> None:
    rows = some_rows(31)
    found = resampled_means(rows, seed=5)
    generator = np.random.default_rng(5)
    loop: dict[str, list[float]] = {"kl": [], "retention": [], "agreement": []}
    for _ in range(2_000):
        drawn = [rows[i] for i in generator.integers(len(rows), size=len(rows))]
        tokens = sum(row.tokens for row in drawn)
        loop["kl"].append(sum(row.kl for row in drawn) / tokens)
        loop["retention"].append(1 - sum(row.kl for row in drawn) / sum(row.base_kl for row in drawn))
        loop["agreement"].append(sum(row.agreed for row in drawn) / tokens)
    for name, values in loop.items():
        assert np.allclose(getattr(found, name), values, rtol=1e-12), name
        assert two_sided(getattr(found, name)) == pytest.approx(tuple(np.quantile(values, (0.025, 0.975))))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random((17, 3))
    whole = resampled_sums(values, seed=2)
    monkeypatch.setattr("bslora_convert.behaviour.intervals.AT_ONCE", 17 * 3 * 7)
    assert np.array_equal(resampled_sums(values, seed=2), whole)
    assert whole.shape == (2_000, 3)


def test_the_same_seed_gives_the_same_and_the_order_of_rows_does_not_count() -> None:
    rows = some_rows(25)
    first = resampled_means(rows, seed=3).kl
    assert np.array_equal(resampled_means(rows[::-1], seed=3).kl, first)
    assert not np.array_equal(resampled_means(rows, seed=4).kl, first)


def test_long_rows_weigh_as_many_tokens_as_they_have() -> None:
    rows = [RowSums(example(1, 99), 99, 0.0, 99.0, 99), RowSums(example(2, 1), 1, 1.0, 1.0, 0)]
    whole = means(rows)
    assert (float(whole.kl), float(whole.agreement)) == (0.01, 0.99)
    assert float(whole.retention) == pytest.approx(0.99)  # 1 − 0.01 / 1, not the mean of the rows' 1 and 0
    assert set(resampled_means(rows).kl.round(9)) == {0.0, 0.01, 1.0}


def test_where_nothing_varies_the_interval_is_a_point() -> None:
    alone = [RowSums(example(1, 4), 4, 0.4, 2.0, 3)]
    found = resampled_means(alone)
    assert two_sided(found.kl) == pytest.approx((0.1, 0.1))
    assert two_sided(found.retention) == pytest.approx((0.8, 0.8))
    same = [RowSums(example(n, 2), 2, -1e-9, 1.0, 2) for n in range(9)]  # rounding below zero
    assert two_sided(resampled_means(same).kl) == (0.0, 0.0)
    assert two_sided(resampled_means(same).retention) == (1.0, 1.0)
    idle = [RowSums(example(n, 2), 2, 0.5, 0.0, 2) for n in range(3)]  # the original changes nothing
    assert two_sided(resampled_means(idle).retention) == (0.0, 0.0)


def test_they_cover_the_mean_as_often_as_they_say() -> None:
    generator = np.random.default_rng(7)
    inside = []
    for _ in range(200):
        tokens = generator.integers(5, 30, size=60)
        kl = np.array([generator.exponential(0.1, size=n).sum() for n in tokens])
        sums = resampled_sums(np.stack([kl, tokens], axis=1), resamples=400)
        low, high = two_sided(sums[:, 0] / sums[:, 1])
        inside.append(low <= 0.1 <= high)
    assert 0.9 <= np.mean(inside) <= 0.99


def test_one_sided_bounds_lie_inside_of_the_interval() -> None:
    samples = np.random.default_rng(0).normal(size=10_000)
    low, high = two_sided(samples)
    assert (low, high) == pytest.approx((-1.96, 1.96), abs=0.06)
    assert (at_least(samples), at_most(samples)) == pytest.approx((-1.645, 1.645), abs=0.06)
    assert at_least(samples, 0.975) == low
    assert at_most(samples, 0.5) == pytest.approx(0.0, abs=0.04)


def test_few_rows_are_said_to_be_few() -> None:
    assert few_words("rows.jsonl", 3, "rows").startswith(
        "rows.jsonl: 3 rows are too few for its interval to be trusted; 20"
    )
