"""The one search over sizes, on curves whose answer is known: near the laxest setting that keeps to the limit, in few trials."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bslora_convert.behaviour.reaching import LARGEST, SMALLEST, predicted
from bslora_convert.conversion.codes import _follow_lost
from bslora_convert.conversion.solve import BEHAVIOUR, BYTES, ERROR, Search, Trial, solve_size


def lost(share: float) -> float:
    """What a size loses, of all the energy: a sixteenth less for each doubling."""
    return min(1.0, (share / 0.01) ** -1.5)


def of_behaviour(make: Any, allowed: float, first: float) -> Search[float]:
    def follow(known: Sequence[Trial[float]], wanted: float) -> float:
        return predicted(known[-1], wanted, lost, 1.0)

    return solve_size(make, allowed, first, follow, BEHAVIOUR, (SMALLEST, LARGEST))


@settings(deadline=None, max_examples=200)
@given(
    st.floats(1e-4, 0.5), st.floats(0.5, 4.0), st.floats(0.005, 1.0), st.floats(SMALLEST, LARGEST), st.floats(0, 0.03)
)
def test_a_behaviour_is_met_near_the_smallest_size(
    allowed: float, steepness: float, size: float, first: float, least: float
) -> None:
    """size: at which exactly what is allowed is missed; the fall is steeper or flatter than the model of it."""
    tried: list[float] = []

    def make(share: float) -> Trial[float] | None:
        tried.append(share)
        if share < least:
            return None
        return Trial(share, allowed * (share / size) ** -steepness, share, share)

    found = of_behaviour(make, allowed, first)
    assert len(found.trials) <= len(tried) <= BEHAVIOUR.trials
    assert all(SMALLEST <= share <= LARGEST for share in tried)
    if size <= LARGEST:
        assert found.best is not None and found.best.setting >= size * (1 - 1e-9)
        answer = max(size, least)
        if 0.02 < first / answer < 50:  # from further away it may run out of trials
            assert found.best.setting <= 1.3 * answer or len(tried) == BEHAVIOUR.trials
    met = [trial.setting for trial in found.trials if trial.value <= allowed]
    assert (found.best.setting if found.best else None) == min(met, default=None)


def test_a_limit_that_no_size_reaches_ends_at_the_largest() -> None:
    found = of_behaviour(lambda share: Trial(share, 0.5, share, share), 0.1, 0.1)
    assert found.best is None
    assert found.trials[-1].setting == LARGEST
    found = of_behaviour(lambda _: None, 0.1, 0.1)
    assert found.best is None and not found.trials


def test_a_size_that_just_reaches_it_ends_the_search() -> None:
    found = of_behaviour(lambda share: Trial(share, 0.1 * BEHAVIOUR.close, share, share), 0.1, 0.1)
    assert len(found.trials) == 1 and found.best is found.trials[0]


def test_a_result_that_misses_nothing_is_made_smaller_to_the_end() -> None:
    found = of_behaviour(lambda share: Trial(share, 0.0, share, share), 0.1, 0.1)
    assert found.best is not None and found.best.setting == SMALLEST and len(found.trials) <= BEHAVIOUR.trials


@settings(deadline=None, max_examples=200)
@given(st.floats(0.5, 2.0), st.floats(0.7, 1.3), st.floats(1e-6, 1.0), st.floats(0.0, 2.0))
def test_an_error_is_met_with_few_bits(gain: float, power: float, allowed: float, least: float) -> None:
    """What is lost is `gain` times a power of what was to be lost, beside what no width keeps: `least` times what may be lost."""

    def make(setting: float) -> Trial[None]:
        reached = allowed * (least + gain * (1 / (setting * allowed)) ** power)
        return Trial(setting, reached, setting, None)  # stricter costs more

    found = solve_size(make, allowed, 1 / (0.985 * allowed), _follow_lost, ERROR, (0.0, 1e12 / allowed))
    assert len(found.trials) <= ERROR.trials
    if least < 0.999:
        assert found.best is not None and found.best.value <= allowed
        if least < 0.9:
            assert found.best.value >= 0.9 * allowed
    if least > 1:
        assert found.best is None


@settings(deadline=None, max_examples=200)
@given(st.integers(2_000, 10**7), st.integers(300, 1200), st.integers(1, 60), st.integers(0, 400))
def test_bytes_are_filled(allowed: int, header: int, grain: int, more: int) -> None:
    """The file is the codes, in whole grains, and a header that is longer than was thought."""

    def make(setting: float) -> Trial[int]:
        codes = round(1 / setting) // grain * grain
        return Trial(setting, codes + header + more, -codes, codes)

    def follow(known: Sequence[Trial[int]], wanted: float) -> float:
        return 1 / max(known[-1].made + wanted - known[-1].value, 1)

    found = solve_size(make, allowed, 1 / (allowed - header), follow, BYTES)
    if allowed - header - more >= grain:
        assert found.best is not None
        assert allowed - grain - max(0.001 * allowed, 1) <= found.best.value <= allowed


def test_the_same_again_ends_the_search() -> None:
    """Small adapters have few sizes: what neither gains nor loses is not tried again."""
    found = solve_size(lambda s: Trial(s, 0.5, 1.0, None), 1.0, 1.0, lambda known, wanted: known[-1].setting / 2, ERROR)
    assert len(found.trials) == 2


@pytest.mark.parametrize("tolerance", [ERROR, BYTES, BEHAVIOUR])
def test_tolerances_are_shares(tolerance: Any) -> None:
    assert 0 < tolerance.close <= tolerance.aimed <= 1 < tolerance.narrow


def test_a_step_that_changes_nothing_leads_to_the_strictest() -> None:
    """Small adapters have few sizes: the same value just above the limit, and one far below it."""

    def make(setting: float) -> Trial[float]:
        return Trial(setting, 1.005 if setting < 1.5 else 0.5, setting, setting)

    found = solve_size(make, 1.0, 1.0, _follow_lost, ERROR, (0.0, 1e12))
    assert found.best is not None and found.best.value == 0.5
    assert found.best.setting < 1e12  # and something laxer is sought from there


def test_nothing_lost_is_made_less_precise() -> None:
    found = solve_size(lambda s: Trial(s, 0.0, s, None), 1.0, 1.0, _follow_lost, ERROR, (0.0, 1e12))
    assert found.best is not None
