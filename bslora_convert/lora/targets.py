"""Which modules a PEFT configuration says are adapted, and fields that say it of a converted adapter."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from bslora_convert.lora.fields import SELECTS, is_set
from bslora_convert.lora.names import key_for

EVERY_LINEAR = "all-linear"
LAYER = re.compile(r".*?\.[^.]*\.(?P<number>\d+)\.")


def target_fields(names: Collection[str], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say that these modules are adapted.

    The source's own where they do; else, and in place of whole names, an expression that matches each module whatever its name
    begins with.
    """
    targets = raw.get("target_modules")
    spelled_out = (
        isinstance(targets, list) and set(map(str, targets)) == set(names) and all("." in name for name in names)
    )
    if targets and not spelled_out and all(selects(raw, name) for name in names):
        return {field: _ordered(raw[field]) for field in SELECTS if is_set(raw.get(field)) or raw.get(field) == 0}
    return {"target_modules": rf"(?:.*\.)?(?:{key_for(names, (), specific=True)})"}


def selects(raw: Mapping[str, Any], name: str) -> bool:
    """Whether a configuration says that a module is adapted, by PEFT's rule; False where only a model could tell."""
    try:
        return (
            _names(raw.get("target_modules"), name)
            and not (raw.get("exclude_modules") and _names(raw["exclude_modules"], name))
            and _in_layers(raw.get("layers_to_transform"), raw.get("layers_pattern"), name)
        )
    except (re.error, TypeError, ValueError, OverflowError, RecursionError):  # nothing that PEFT could take either
        return False


def _names(targets: Any, name: str) -> bool:
    if isinstance(targets, str):
        return targets.lower() != EVERY_LINEAR and re.fullmatch(targets, name) is not None
    return isinstance(targets, list) and any(f".{name}".endswith(f".{target}") for target in targets)


def _in_layers(numbers: Any, patterns: Any, name: str) -> bool:
    if numbers is None or numbers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    expressions = [re.compile(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\.") for pattern in patterns or ()] or [LAYER]
    match = next((found for expression in expressions if (found := expression.match(name))), None)
    return match is not None and int(match["number"]) in (numbers if isinstance(numbers, list) else [numbers])


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(entry, str) for entry in value) else value
