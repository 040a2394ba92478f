"""Which form won at each size."""

from collections.abc import Mapping
from typing import Any

from bslora_convert.comparison.forms import OWN_SIZE


def winners(record: Mapping[str, Any]) -> dict[float, str]:
    """For each budget the form of the lowest error."""
    best: dict[float, Mapping[str, Any]] = {}
    for row in record["rows"]:
        if row["form"] in OWN_SIZE or row["relative_error"] is None:
            continue
        known = best.get(row["budget"])
        if known is None or row["relative_error"] < known["relative_error"]:
            best[row["budget"]] = row
    return {budget: str(row["form"]) for budget, row in best.items()}
