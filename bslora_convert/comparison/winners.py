"""Which form won at each size."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from bslora_convert.comparison.forms import FORMS, OWN_SIZE

Row = Mapping[str, Any]


def error(row: Row) -> float | None:
    """The relative error of its weights; None where nothing was fitted."""
    value: float | None = row["relative_error"]
    return value


def kl(row: Row) -> float | None:
    """The KL to the original; None where it was not measured."""
    return float(row["functional"]["kl"]) if row["functional"] else None


def winners(
    record: Mapping[str, Any], among: Collection[str] = FORMS, measure: Callable[[Row], float | None] = error
) -> dict[float, str]:
    """For each budget the form of the lowest measure, of those that are held to the budget."""
    best: dict[float, tuple[float, str]] = {}
    for row in record["rows"]:
        value = measure(row)
        if row["form"] in OWN_SIZE or row["form"] not in among or value is None:
            continue
        if row["budget"] not in best or value < best[row["budget"]][0]:
            best[row["budget"]] = value, str(row["form"])
    return {budget: form for budget, (_, form) in best.items()}
