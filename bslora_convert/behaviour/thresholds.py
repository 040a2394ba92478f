"""What must hold of a measurement: limits that are checked before and after it."""

import math
from dataclasses import dataclass, fields
from typing import Any

from bslora_convert.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What must hold; a measure without a threshold is only reported."""

    max_kl: float | None = None
    min_agreement: float | None = None
    min_retention: float | None = None
    max_accuracy_drop: float | None = None

    def __post_init__(self) -> None:
        """:raises RecipeError: for a limit that nothing can meet."""
        for field in fields(self):
            limit = getattr(self, field.name)
            most = 1.0 if field.name.startswith("min") else math.inf
            if limit is not None and not (math.isfinite(limit) and limit <= most):
                allowed = "at most 1" if field.name.startswith("min") else "finite"
                raise RecipeError(f"{field.name} is {limit!r}: a number, {allowed}, is allowed", field.name)

    def check_measured(self, prompts: bool, tasks: bool) -> None:
        """:raises RecipeError: when a threshold needs what is not going to be measured."""
        for field in fields(self):
            needs, given = ("tasks", tasks) if "accuracy" in field.name else ("prompts", prompts)
            if getattr(self, field.name) is not None and not given:
                raise RecipeError(f"{field.name} needs {needs}, which were not given", field.name, needs)

    def check(self, record: dict[str, Any]) -> dict[str, Any]:
        """Each threshold that was set with the value that it met or missed."""
        drops = [task["reference"] - task["compact"] for task in record["tasks"].values()]
        values = {
            "max_kl": record["kl"],
            "min_agreement": record["agreement"],
            "min_retention": record["retention"],
            "max_accuracy_drop": max(drops, default=None),
        }
        checked = {}
        for name, value in values.items():
            limit = getattr(self, name)
            if limit is None:
                continue
            assert value is not None  # check_measured sees to it
            passed = value >= limit if name.startswith("min") else value <= limit
            checked[name] = {"limit": limit, "value": value, "passed": passed}
        return checked
