"""The search over sizes, on curves whose answer is known: near the smallest size that reaches the limit, in few attempts."""

import numpy as np
import pytest
from bslora_convert.behaviour.smallest import (
    ATTEMPTS,
    CLOSE,
    LARGEST,
    SMALLEST,
    Attempt,
    bound_of,
    first_lost,
    missed_of,
    smallest,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from bslora_convert.behaviour.rows import RowSums
from tests.behaviour.test_intervals import example, some_rows


def lost(share: float) -> float:
    """What a size loses, of all the energy: a sixteenth less for each doubling."""
    return min(1.0, (share / 0.01) ** -1.5)


@settings(deadline=None, max_examples=200)
@given(
    st.floats(1e-4, 0.5), st.floats(0.5, 4.0), st.floats(0.005, 1.0), st.floats(SMALLEST, LARGEST), st.floats(0, 0.03)
)
def test_it_comes_near_the_smallest_size(
    allowed: float, steepness: float, size: float, first: float, least: float
) -> None:
    """size: at which exactly what is allowed is missed; the fall is steeper or flatter than the model of it."""
    tried: list[float] = []

    def make(share: float) -> Attempt[float] | None:
        tried.append(share)
        if share < least:
            return None
        return Attempt(share, share, allowed * (share / size) ** -steepness, allowed)

    best, attempts = smallest(make, first, lost, 1.0)
    assert len(tried) <= ATTEMPTS
    assert len(attempts) <= len(tried) and all(SMALLEST <= share <= LARGEST for share in tried)
    if size <= LARGEST:
        assert best is not None and best.met and best.share >= size * (1 - 1e-9)
        answer = max(size, least)
        if 0.02 < first / answer < 50:  # from further away it may run out of attempts
            assert best.share <= 1.3 * answer or len(tried) == ATTEMPTS
    assert best is None or best.share == min(one.share for one in attempts if one.met)


def test_a_limit_that_no_size_reaches_ends_at_the_largest() -> None:
    best, attempts = smallest(lambda share: Attempt(share, share, 0.5, 0.1), 0.1, lost, 1.0)
    assert best is None
    assert attempts[-1].share == LARGEST
    best, attempts = smallest(lambda _: None, 0.1, lost, 1.0)
    assert best is None and not attempts


def test_a_size_that_just_reaches_it_ends_the_search() -> None:
    best, attempts = smallest(lambda share: Attempt(share, share, 0.1 * CLOSE, 0.1), 0.1, lost, 1.0)
    assert len(attempts) == 1 and best is attempts[0]


def test_a_result_that_misses_nothing_is_made_smaller_to_the_end() -> None:
    best, attempts = smallest(lambda share: Attempt(share, share, 0.0, 0.1), 0.1, lost, 1.0)
    assert best is not None and best.share == SMALLEST and len(attempts) <= ATTEMPTS


def test_bounds_lie_on_the_safe_side_and_come_nearer_with_rows() -> None:
    few, many = some_rows(20), some_rows(400)
    for aim in ("min_retention", "max_kl", "min_agreement"):
        safe = [missed_of(aim, bound_of(rows, aim, 0)) for rows in (few, many)]
        assert safe[0] > safe[1] > 0, aim


def test_agreement_everywhere_is_no_certainty() -> None:
    rows = [RowSums(example(line, 10), 10, 0.0, 1.0, 10) for line in range(1, 31)]
    assert bound_of(rows, "min_agreement", 0) == pytest.approx(1 - 3 / 300)
    assert bound_of(rows, "min_retention", 0) == 1.0


def test_first_guesses_are_shares() -> None:
    for aim in ("min_retention", "max_kl", "min_agreement"):
        for allowed in np.geomspace(1e-6, 1.0, 9):
            assert 0 < first_lost(aim, allowed) < 1
