"""What a model card says to the Hub: metadata of the source's own card carried on, and what is known of the result."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bslora_convert.files.card import CARRIED
from bslora_convert.files.hub import REPO
from bslora_convert.report.commands import UNKNOWN_BASE

WEIGHT_FILES = (".safetensors", ".bin", ".pt")
RESERVED = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})

# What PEFT calls a task -> (the Hub's word, transformers' class)
TASKS = {
    "CAUSAL_LM": ("text-generation", "AutoModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoModelForTokenClassification"),
    "QUESTION_ANS": ("question-answering", "AutoModelForQuestionAnswering"),
    "FEATURE_EXTRACTION": ("feature-extraction", "AutoModel"),
}


def metadata(
    source: Mapping[str, Any], library: str | None, base_model: str | None, task: str | None, tags: Sequence[str]
) -> dict[str, Any]:
    """The metadata of a result. source: of `files/card.py`. library: `peft` or another, that loads it. task: PEFT's word.

    A base model is named where the Hub can know it: a path on this machine is none.
    """
    kept = {name: value for name, value in source.items() if name in CARRIED and name not in ("tags", "pipeline_tag")}
    own = source.get("tags", [])
    every = [*([own] if isinstance(own, str) else own), *tags]
    word = source.get("pipeline_tag") or (TASKS[task][0] if task in TASKS else None)
    known = base_model is not None and hub_name(base_model) == base_model
    return {
        **kept,
        **({"library_name": library} if library else {}),
        **({"base_model": base_model, "base_model_relation": "adapter"} if known else {}),
        **({"pipeline_tag": word} if word else {}),
        "tags": list(dict.fromkeys(every)),
    }


def hub_name(base_model: str | None) -> str:
    """What a snippet calls a base model: its name on the Hub, or BASE_MODEL where it is a path of somebody's disk."""
    return base_model if base_model is not None and REPO.fullmatch(base_model) else UNKNOWN_BASE


def name_of(path: str) -> str:
    """What an adapter is called after the place that it came from: the last part of its directory's path, or of an address."""
    parts = [part for part in re.split(r"[/\\]", path.partition("?")[0]) if part]
    if parts and parts[-1].endswith(WEIGHT_FILES):
        parts = parts[:-1]
    return parts[-1].partition("@")[0] if parts else "adapter"


def front_matter(fields: Mapping[str, Any]) -> str:
    """The fields as a card begins with them; JSON's texts are YAML's too."""
    lines = ["---"]
    for name, value in fields.items():
        if isinstance(value, str):
            lines.append(f"{name}: {_written(value)}")
        else:
            lines += [f"{name}:", *(f"- {_written(one)}" for one in value)]
    return "\n".join([*lines, "---", ""])


def model_class(task: str | None) -> str:
    """The class of transformers that loads the base model of a task."""
    return TASKS[task][1] if task in TASKS else "AutoModel"


def _written(value: str) -> str:
    """A text as YAML reads it back: as it is where nothing else could be meant, else in quotes."""
    simple = re.fullmatch(r"[A-Za-z][\w.-]*(/[\w.-]+)?", value) is not None and value.lower() not in RESERVED
    return value if simple else json.dumps(value, ensure_ascii=False)
