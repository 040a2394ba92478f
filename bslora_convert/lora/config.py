"""What a PEFT `adapter_config.json` says, and what in it can't be converted faithfully.

Scaling follows PEFT: alpha / r, alpha / √r with rsLoRA; `rank_pattern` and `alpha_pattern` are matched independently, the first
key whose regular expression matches the end of the module's name wins.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bslora_convert.errors import InputError, Refused

DEFAULT_RANK = 8
DEFAULT_ALPHA = 8.0
LONGEST_PATTERN = 512

# Fields that say nothing about ΔW, or that are read elsewhere in this file.
UNDERSTOOD = frozenset(
    {
        "alpha_pattern",
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "library_name",
        "lora_alpha",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "modules_to_save",
        "monteclora_config",
        "parent_library",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "rank_pattern",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "trainable_token_indices",
        "unsloth_fixed",
        "use_rslora",
        "velora_config",
    }
)


def _is_set(value: Any) -> bool:
    return value not in (None, False, "", [], {}, ())


def _changes_base(value: Any) -> bool:
    return isinstance(value, str) and value.lower().startswith(("pissa", "olora", "corda", "loftq"))


# field -> (when it is refused, why)
REFUSALS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "use_dora": (_is_set, "DoRA rescales the base weight, so its update is not B·A"),
    "lora_bias": (_is_set, "lora_bias adds a bias that low-rank factors can't hold"),
    "bias": (lambda value: value not in (None, "none"), "trained biases are not part of B·A"),
    "init_lora_weights": (_changes_base, "this initialisation changes the base weights, so B·A is not the update"),
    "corda_config": (_is_set, "CorDA changes the base weights, so B·A is not the update"),
    "loftq_config": (_is_set, "LoftQ changes the base weights, so B·A is not the update"),
    "use_qalora": (_is_set, "QALoRA applies A to pooled inputs"),
    "use_bdlora": (_is_set, "BD-LoRA factors are block-diagonal"),
    "alora_invocation_tokens": (_is_set, "aLoRA is active only after its invocation tokens"),
    "target_parameters": (_is_set, "adapters on raw parameters (fused experts) have three-dimensional updates"),
    "layer_replication": (_is_set, "layer numbers are those of a model with repeated layers"),
    "megatron_config": (_is_set, "Megatron layers are split across devices"),
    "kasa_config": (_is_set, "KaSA truncates the base weights"),
    "arrow_config": (_is_set, "Arrow routes between adapters at run time"),
}


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The part of a PEFT LoRA configuration that decides ΔW, and the raw fields that travel along."""

    raw: Mapping[str, Any]
    rank: int
    alpha: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def parse(cls, raw: Mapping[str, Any], path: Path) -> "LoraConfig":
        """Checks and reads the fields.

        :raises InputError: when a field has the wrong type.
        """
        rank = raw.get("r", DEFAULT_RANK)
        alpha = raw.get("lora_alpha", DEFAULT_ALPHA)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise InputError(f"{path}: r is {rank!r}, a positive whole number is expected")
        patterns = {}
        for field in ("rank_pattern", "alpha_pattern"):
            pattern = raw.get(field) or {}
            if not isinstance(pattern, dict):
                raise InputError(f"{path}: {field} is {type(pattern).__name__}, an object is expected")
            for key, value in pattern.items():
                _check_pattern(path, field, key)
                _check_number(path, f"{field}[{key}]", value)
            patterns[field] = pattern
        return cls(
            raw,
            rank,
            _check_number(path, "lora_alpha", alpha),
            bool(raw.get("use_rslora", False)),
            patterns["rank_pattern"],
            {key: float(value) for key, value in patterns["alpha_pattern"].items()},
        )

    def expected_rank(self, module: str) -> int:
        """Rank that the configuration gives a module."""
        return int(_first_match(self.rank_pattern, module, self.rank))

    def scaling(self, module: str, rank: int) -> float:
        """Factor on B·A of a module whose tensors have this rank."""
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


def check_convertible(raw: Mapping[str, Any], path: Path) -> list[str]:
    """Every reason why an adapter with this configuration can't be converted; empty where it can."""
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        known = " (it is compact already; `expand` makes it a LoRA)" if kind == "BSLORA" else ""
        return [f"peft_type is {kind!r}, only 'LORA' adapters are converted{known}"]
    return unfaithful(raw)


def unfaithful(raw: Mapping[str, Any], understood: Collection[str] = UNDERSTOOD) -> list[str]:
    """Every setting of a PEFT configuration that changes the update in a way that factors alone don't show.

    understood: fields that don't.
    """
    reasons = [
        f"{field} is {_brief(raw[field])}: {why}"
        for field, (refused, why) in REFUSALS.items()
        if field in raw and refused(raw[field])
    ]
    reasons += [
        f"{field} is {_brief(value)}: a setting that this version does not know, which may change the update"
        for field, value in raw.items()
        if field not in understood and field not in REFUSALS and _is_set(value)
    ]
    return reasons


def refuse_unless_convertible(raw: Mapping[str, Any], path: Path) -> None:
    """Raises on the first of `check_convertible`.

    :raises Refused: with every reason.
    """
    reasons = check_convertible(raw, path)
    if reasons:
        raise Refused(f"{path}: " + "; ".join(reasons))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_match(pattern: Mapping[str, float], module: str, default: float) -> float:
    for key, value in pattern.items():
        if re.match(_whole(key), module):
            return value
    return default


def _whole(key: str) -> str:
    """The expression that PEFT matches against a whole module name."""
    return rf"(.*\.)?({key})$"


def _check_pattern(path: Path, field: str, key: str) -> None:
    if len(key) > LONGEST_PATTERN:
        raise InputError(f"{path}: {field} has a pattern of {len(key)} characters, at most {LONGEST_PATTERN} are read")
    try:
        re.compile(_whole(key))
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: {field} pattern {key!r} is not a regular expression ({error})") from None


def _check_number(path: Path, field: str, value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond what a float holds
        pass
    raise InputError(f"{path}: {field} is {_brief(value)}, a finite number is expected")
