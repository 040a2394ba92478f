"""Whether a measurement keeps to the limits that it was given."""

from collections.abc import Mapping
from typing import Any

from bslora_convert.recipe.measures import ACCURACY_DROP, MEASURES
from bslora_convert.results.behaviour import ThresholdRecord


def checked_limits(measured: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, ThresholdRecord]:
    """`thresholds` of verify.json: each limit, by option, with the value that meets or misses it.

    measured: values by the measures' names, and `tasks`.
    """
    drops = [task.reference - task.compact for task in measured["tasks"].values()]
    values = {**measured, ACCURACY_DROP.name: max(drops, default=None)}
    return {
        name: ThresholdRecord(limit=limit, value=(value := values[measure.name]), passed=measure.is_met(value, limit))
        for name, measure in MEASURES.items()
        if (limit := limits.get(name)) is not None
    }
