"""Which form won at each size."""

from collections.abc import Callable, Collection

from bslora_convert.comparison.forms import FORMS, OWN_SIZE
from bslora_convert.results.analysis import Comparison, FormRow


def error(row: FormRow) -> float | None:
    """The relative error of its weights; None where nothing was fitted."""
    return row.relative_error


def kl(row: FormRow) -> float | None:
    """The KL to the original; None where it was not measured."""
    return row.kl


def winners(
    record: Comparison, among: Collection[str] = FORMS, measure: Callable[[FormRow], float | None] = error
) -> dict[float, str]:
    """For each budget the form of the lowest measure, of those that are held to the budget."""
    best: dict[float, tuple[float, str]] = {}
    for row in record.rows:
        value = measure(row)
        if row.form in OWN_SIZE or row.form not in among or value is None:
            continue
        if row.budget not in best or value < best[row.budget][0]:
            best[row.budget] = value, row.form
    return {budget: form for budget, (_, form) in best.items()}
