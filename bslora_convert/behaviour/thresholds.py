"""Whether a measurement keeps to the limits that it was given."""

from collections.abc import Mapping
from typing import Any

from bslora_convert.recipe.measures import ACCURACY_DROP, MEASURES


def checked_limits(record: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """`thresholds` of verify.json: each limit, by option, with the value that meets or misses it."""
    drops = [task["reference"] - task["compact"] for task in record["tasks"].values()]
    values = {**record, ACCURACY_DROP.name: max(drops, default=None)}
    return {
        name: {"limit": limit, "value": (value := values[measure.name]), "passed": measure.is_met(value, limit)}
        for name, measure in MEASURES.items()
        if (limit := limits.get(name)) is not None
    }
