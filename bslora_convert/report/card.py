"""README.md of a compact directory: a model card with the invocation, the source's hash and the measured fidelity."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from bslora_convert.recipe.files import call, to_toml
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.training import Training
from bslora_convert.report import verdict
from bslora_convert.report.environment import environment
from bslora_convert.report.metadata import front_matter, hub_name, metadata, model_class, name_of
from bslora_convert.results.adapter import Fidelity

FILE = "recipe.toml"  # of the invocation, where options have no flag


def render(record: Fidelity, config: Mapping[str, Any]) -> str:
    """The card of one conversion."""
    options = Recipe.from_dict(record.recipe).given()
    if record.training is not None:
        options |= Training(**record.training.options).given()
    words, rest = call(options)
    words = [
        "bslora-convert",
        "compress",
        record.source.path,
        "OUT_DIR",
        *words,
        *(["--recipe", FILE] if rest else []),
    ]
    base_model, task = config.get("base_model_name_or_path"), config.get("task_type")
    said = metadata(record.source.card or {}, "peft", base_model, task, ("lora", "bslora"))
    urgent, notes = verdict.attention(record.notes)
    invocation = shlex.join(words)
    return (
        environment()
        .get_template("card.md")
        .render(
            record=record,
            front_matter=front_matter(said),
            name=name_of(record.source.path),
            base_model=hub_name(base_model),
            model_class=model_class(task),
            generates=task in (None, "CAUSAL_LM"),
            invocation=invocation,
            recipe_file=FILE,
            recipe=to_toml(rest),
            fence="`" * (1 + max(map(len, re.findall("`{2,}", invocation)), default=2)),  # longer than any within
            verdict=verdict.sentences(record),
            urgent=urgent,
            notes=notes,
        )
    )
