"""What a PEFT `adapter_config.json` says, and what in it can't be converted faithfully; `fields.py` lists every field.

Scaling follows PEFT: alpha / r, alpha / √r with rsLoRA; `rank_pattern` and `alpha_pattern` are matched independently, the first
key whose regular expression matches the end of the module's name wins.
"""

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bslora_convert.errors import InputError, Refused
from bslora_convert.lora.fields import KNOWN, REFUSED, is_set, is_training
from bslora_convert.lora.names import matches, whole

LONGEST_PATTERN = 1 << 16

# What an adapter of another kind is, and what can be done.
CONVERTED_BY_PEFT = "PEFT's save_as_lora makes a LoRA of it on its base model"
OTHER_TYPES = {
    "BSLORA": "it is compact already; `expand` makes it a LoRA",
    "SHARELORA": "the BSLoRA authors' layout; `compress` and `expand` read its directory",
    "ADALORA": "AdaLoRA holds a third factor; merge it into its base model instead",
    **dict.fromkeys(
        ("C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "TINYLORA", "UNILORA", "VBLORA",
         "VERA"),
        CONVERTED_BY_PEFT,
    ),
}  # fmt: skip


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

        :raises InputError: when a field has the wrong type, or r or lora_alpha is missing.
        """
        rank, alpha = raw.get("r"), raw.get("lora_alpha")
        if alpha is None:
            raise InputError(
                f"{path}: lora_alpha is missing, and without it nobody knows the scaling; give it as --lora-alpha (in Python "
                "alpha=…), or write it into the file"
            )
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

    def said(self, module: str, rank: int) -> str:
        """The scaling of a module as a reader would write it: `16/√8 = 5.65685`."""
        alpha = _first_match(self.alpha_pattern, module, self.alpha)
        return f"{alpha:g}/{'√' if self.rslora else ''}{rank} = {self.scaling(module, rank):g}"


def given(raw: Mapping[str, Any], path: Path, alpha: float | None, rslora: bool | None) -> dict[str, Any]:
    """The configuration with the scaling that the caller knows where the file does not say it.

    :raises InputError: when the file says otherwise.
    """
    filled = dict(raw)
    for field, value in (("lora_alpha", alpha), ("use_rslora", rslora)):
        if value is None:
            continue
        if raw.get(field) not in (None, value):
            raise InputError(f"{path}: {field} is {_brief(raw[field])} there and {value!r} is given; leave it out")
        filled[field] = value
    return filled


def check_convertible(raw: Mapping[str, Any], path: Path, ignored: Collection[str] = ()) -> list[str]:
    """Every reason why an adapter with this configuration can't be converted; empty where it can.

    ignored: settings that are not known here, and that the user answers for.
    """
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        known = OTHER_TYPES.get(kind) if isinstance(kind, str) else None
        return [f"peft_type is {kind!r}, only 'LORA' adapters are converted{f' ({known})' if known else ''}"]
    return unfaithful(raw, ignored)


def unfaithful(raw: Mapping[str, Any], understood: Collection[str] = ()) -> list[str]:
    """Every setting of a PEFT configuration that changes the update in a way that factors alone don't show.

    understood: further fields that don't.
    """
    reasons = [
        f"{name} is {_brief(raw[name])}: {field.why}"
        for name, field in REFUSED.items()
        if name in raw and field.when(raw[name])
    ]
    reasons += [
        f"{name} is {_brief(value)}: a setting that this version does not know, which may change the update (if you know that "
        f"it does not: --ignore-field {name})"
        for name, value in raw.items()
        if name not in KNOWN and name not in understood and is_set(value) and not is_training(name)
    ]
    return reasons


def refuse_unless_convertible(raw: Mapping[str, Any], path: Path, ignored: Collection[str] = ()) -> None:
    """Raises on the first of `check_convertible`.

    :raises Refused: with every reason.
    """
    reasons = check_convertible(raw, path, ignored)
    if reasons:
        raise Refused(f"{path}: " + "; ".join(reasons))


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _first_match(pattern: Mapping[str, float], module: str, default: float) -> float:
    return next((value for key, value in pattern.items() if matches(key, module)), default)


def _check_pattern(path: Path, field: str, key: str) -> None:
    if len(key) > LONGEST_PATTERN:
        raise InputError(f"{path}: {field} has a pattern of {len(key)} characters, at most {LONGEST_PATTERN} are read")
    try:
        re.compile(whole(key))
    except (re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: {field} pattern {key!r} is not a regular expression ({error})") from None


def _check_number(path: Path, field: str, value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # a whole number beyond what a float holds
        pass
    raise InputError(f"{path}: {field} is {_brief(value)}, a finite number is expected")
