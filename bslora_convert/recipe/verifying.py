"""What `verify` is asked for."""

import math
from dataclasses import dataclass
from pathlib import Path

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.checks import check_count
from bslora_convert.recipe.measures import ACCURACY_DROP, MEASURES
from bslora_convert.recipe.options import (
    OUTPUT,
    RUNNING,
    THRESHOLDS,
    WHAT,
    WHOM,
    accept_changed_option,
    base_dtype_option,
    device_option,
    option,
)


@dataclass(frozen=True, slots=True)
class VerifyOptions:
    """reference, base_model: None is what the compact directory records. prompts, tasks: one of them at least.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    prompts: str | Path | None = option(
        None, "Measure behaviour on these JSONL rows, gzip accepted.", WHAT, metavar="FILE"
    )
    tasks: tuple[str, ...] = option(
        (), "Run these tasks of lm-evaluation-harness (extra eval); local_* read --task-data.", WHAT, metavar="A,B,…"
    )
    limit: int | None = option(None, "Take the first rows, or items of each task, only.", WHAT, usual="all")
    task_data: str | Path | None = option(
        None, "Read the data of local_* tasks, local JSON, from this directory.", WHAT, metavar="DIR"
    )
    include_path: str | Path | None = option(
        None, "Find more task files (YAML) in this directory.", WHAT, metavar="DIR"
    )
    max_new_tokens: int = option(64, "Limit the texts that both adapters generate, in tokens; 0 = none.", WHAT)
    max_length: int | None = option(None, "Cut rows to this many tokens.", WHAT, usual="the model's context")
    chat_template: bool = option(True, "Read prompts as a user's turn of the chat template.", WHAT)
    max_kl: float | None = option(None, "Ask for at most this KL to the original, in nats a token.", THRESHOLDS)
    min_agreement: float | None = option(
        None, "Ask for at least this share of tokens with the same first choice.", THRESHOLDS
    )
    min_retention: float | None = option(None, "Ask for at least this share of the adapter's effect.", THRESHOLDS)
    max_accuracy_drop: float | None = option(None, "Ask that no task's score drops by more than this.", THRESHOLDS)
    reference: str | Path | None = option(
        None, "Compare with this LoRA.", WHOM, metavar="LORA", usual="what COMPACT was made from"
    )
    any_reference: bool = option(False, "Allow a reference that COMPACT was not made from.", WHOM)
    base_model: str | Path | None = option(
        None, "Run this base model, a directory or a hub name.", WHOM, metavar="MODEL", usual="what COMPACT names"
    )
    accept_changed: bool = accept_changed_option()
    save: bool = option(False, "Write verify.json into COMPACT, and its record and page.", OUTPUT)
    out: str | Path | None = option(
        None, "Write the result into this file, outside of COMPACT.", OUTPUT, metavar="FILE"
    )
    overwrite: bool = option(False, "Let the result replace one of more rows or items.", OUTPUT)
    batch_size: int = option(8, "Run this many rows at once.", RUNNING)
    device: str = device_option()
    dtype: str = base_dtype_option()
    seed: int = option(0, "Draw the intervals and few-shot examples from this.", RUNNING)

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "max_length"):
            check_count(name, getattr(self, name))
        if self.max_new_tokens < 0:
            raise RecipeError(
                f"max_new_tokens is {self.max_new_tokens}: zero (no generations) or more is allowed", "max_new_tokens"
            )
        for name, limit in self.limits.items():
            bounded = MEASURES[name].more_is_better
            if not (math.isfinite(limit) and limit <= (1.0 if bounded else math.inf)):
                allowed = "at most 1" if bounded else "finite"
                raise RecipeError(f"{name} is {limit!r}: a number, {allowed}, is allowed", name)
        if self.save and self.out is not None:
            raise RecipeError("save and out exclude each other: give one of them", "save", "out")

    @property
    def limits(self) -> dict[str, float]:
        """The thresholds that are set, by option."""
        return {name: limit for name in MEASURES if (limit := getattr(self, name)) is not None}

    def check_measured(self, prompts: bool, also: str = "") -> None:
        """Refuses to measure nothing, and a threshold of what is not measured. prompts: whether there are any.

        :raises RecipeError: naming the options.
        """
        if not prompts and not self.tasks:
            raise RecipeError(f"nothing to measure: give prompts, tasks or both{also}", "prompts", "tasks")
        for name in self.limits:
            needs, measured = ("tasks", bool(self.tasks)) if name == ACCURACY_DROP.option else ("prompts", prompts)
            if not measured:
                raise RecipeError(f"{name} needs {needs}, which were not given", name, needs)
