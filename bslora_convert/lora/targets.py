"""Which modules a PEFT configuration says are adapted, and fields that say it of a converted adapter."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from bslora_convert.lora.experts import stacked
from bslora_convert.lora.fields import SELECTS, is_set
from bslora_convert.lora.fused import in_fused
from bslora_convert.lora.names import key_for

EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")  # of the targets that make PEFT tie
EVERY_LINEAR = "all-linear"
LAYER = re.compile(r".*?\.[^.]*\.(?P<number>\d+)\.")


def target_fields(names: Collection[str], raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that say that these modules are adapted.

    The source's own where they do; else, and in place of whole names, an expression that matches each module whatever its name
    begins with, or the last parts of names where there are experts.
    """
    experts = in_fused(names)
    names = dict.fromkeys(
        experts[name][0] if name in experts else name for name in names
    )  # of fused experts what holds them
    targets = raw.get("target_modules")
    spelled_out = (
        isinstance(targets, list) and set(map(str, targets)) == set(names) and all("." in name for name in names)
    )
    ties = ties_targets(raw)
    if targets and not (spelled_out and not ties) and all(selects(raw, name) for name in names):
        return {field: _ordered(raw[field]) for field in SELECTS if is_set(raw.get(field)) or raw.get(field) == 0}
    if stacked(names):  # PEFT finds stacked experts by the last part of a target only
        return {"target_modules": sorted({name.rpartition(".")[2] for name in names})}
    expression = rf"(?:.*\.)?(?:{key_for(names, (), specific=True)})"
    return {"target_modules": f"{expression}|{EMBEDDING_LAYER_NAMES[0]}" if ties else expression}


def ties_targets(raw: Mapping[str, Any]) -> bool:
    """Whether PEFT ties the adapter of a tied embedding to the head's, by its rule: a target has one of two bare names."""
    if not raw.get("ensure_weight_tying") or _names_embedding(raw.get("modules_to_save")):
        return False
    targets = raw.get("target_modules")
    if not isinstance(targets, str):
        return _names_embedding(targets)
    try:
        return any(re.fullmatch(targets, name) for name in EMBEDDING_LAYER_NAMES)
    except (re.error, RecursionError, OverflowError):
        return False


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


def _names_embedding(names: Any) -> bool:
    return isinstance(names, list) and any(
        isinstance(name, str) and name.split(".")[-1] in EMBEDDING_LAYER_NAMES for name in names
    )


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, list) and all(isinstance(entry, str) for entry in value) else value
