"""Benchmark tasks through lm-evaluation-harness (extra `eval`), the same items for base, reference and compact.

Scores of one item are paired, so the interval of the difference compact − reference comes from resampling items.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bslora_convert.behaviour.intervals import paired_interval
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.process.progress import Progress
from bslora_convert.process.quiet import hushed
from bslora_convert.recipe.verifying import VerifyOptions

TASKS = Path(__file__).parent / "tasks"
PREFERRED = ("acc", "exact_match", "acc_norm")


@dataclass(frozen=True, slots=True)
class Scores:
    """One task's metric and every item's score, in the order of items, by what was active."""

    metric: str
    items: dict[str, np.ndarray]

    def compared(self, seed: int) -> dict[str, Any]:
        """{"metric", "items", "base", "reference", "compact", "difference_ci95"} as `verify.json` has it."""
        return {
            "metric": self.metric,
            "items": len(self.items["compact"]),
            **{name: float(values.mean()) for name, values in self.items.items()},
            "difference_ci95": list(paired_interval(self.items["compact"], self.items["reference"], seed)),
        }


def evaluate(
    base: BaseModel, states: Mapping[str, AbstractContextManager[Any]], asked: VerifyOptions, progress: Progress
) -> dict[str, "Scores"]:
    """Scores by task.

    states: what is active on the model, by name. asked: the tasks and how they are run.

    :raises RecipeError: when a task is unknown. :raises InputError: when a task can't be read.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    metadata = {"data": str(asked.task_data)} if asked.task_data else None
    manager = _manager(asked, metadata)
    model = HFLM(pretrained=base.model, tokenizer=base.tokenizer, batch_size=asked.batch_size)
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    scores: dict[str, Scores] = {}
    for name, state in states.items():
        progress("running tasks", words=f"with {name}")
        with state, hushed():
            try:
                found = simple_evaluate(
                    model=model,
                    tasks=list(asked.tasks),
                    limit=asked.limit,
                    task_manager=manager,
                    bootstrap_iters=0,
                    apply_chat_template=asked.chat_template and bool(base.tokenizer.chat_template),
                    metadata=metadata,
                    **dict.fromkeys(seeds, asked.seed),
                )
            except (ValueError, OSError) as error:
                raise InputError(f"tasks {', '.join(asked.tasks)}: {error}") from None
        for task in asked.tasks:
            samples = found["samples"].get(task)
            if not samples:
                raise RecipeError(f"tasks: {task} is a group or has no items; name single tasks", "tasks")
            known = scores.setdefault(task, Scores(_metric(samples), {}))
            known.items[name] = _scores(samples, known.metric)
    return scores


def _manager(asked: VerifyOptions, metadata: Mapping[str, str] | None) -> Any:
    """Where the tasks are found.

    :raises RecipeError: when one is unknown.
    """
    from lm_eval.tasks import TaskManager

    folders = [str(TASKS), *([str(asked.include_path)] if asked.include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    if not set(asked.tasks) <= set(manager.all_tasks):  # reading its thousands of own files takes many seconds
        manager = TaskManager(include_path=folders, metadata=metadata)
    unknown = sorted(set(asked.tasks) - set(manager.all_tasks))
    if unknown:
        shipped = ", ".join(sorted(f"local_{path.stem}" for path in TASKS.glob("*.yaml")))
        raise RecipeError(
            f"tasks: {', '.join(unknown)} unknown; shipped for local files: {shipped}; others by lm_eval's names",
            "tasks",
        )
    return manager


def _metric(samples: Sequence[Mapping[str, Any]]) -> str:
    named = samples[0]["metrics"]
    return next((metric for metric in PREFERRED if metric in named), named[0])


def _scores(samples: Sequence[Mapping[str, Any]], metric: str) -> np.ndarray:
    """Each item's score in the order of items; where a task filters answers in several ways, the first way counts."""
    chosen = samples[0].get("filter")
    items = sorted((s for s in samples if s.get("filter") == chosen), key=lambda sample: sample["doc_id"])
    return np.array([float(sample[metric]) for sample in items])
