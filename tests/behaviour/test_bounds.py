"""What a measure is at least of all rows, and the first guess at a size."""

import numpy as np
import pytest

from bslora_convert.behaviour.reaching import bound_of, first_lost
from bslora_convert.behaviour.rows import RowSums
from bslora_convert.recipe.measures import AGREEMENT, ON_PROMPTS, RETENTION
from tests.behaviour.test_intervals import example, some_rows


def test_bounds_lie_on_the_safe_side_and_come_nearer_with_rows() -> None:
    few, many = some_rows(20), some_rows(400)
    for measure in ON_PROMPTS.values():
        safe = [measure.missed(bound_of(rows, measure, 0)) for rows in (few, many)]
        assert safe[0] > safe[1] > 0, measure.name


def test_agreement_everywhere_is_no_certainty() -> None:
    rows = [RowSums(example(line, 10), 10, 0.0, 1.0, 10) for line in range(1, 31)]
    assert bound_of(rows, AGREEMENT, 0) == pytest.approx(1 - 3 / 300)
    assert bound_of(rows, RETENTION, 0) == 1.0


def test_first_guesses_are_shares() -> None:
    for measure in ON_PROMPTS.values():
        for allowed in np.geomspace(1e-6, 1.0, 9):
            assert 0 < first_lost(measure, allowed) < 1
