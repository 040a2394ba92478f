"""The base model with the original adapter on it, and the rows that are read for them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bslora_convert.behaviour.adapter import Adapter, check_pair, read_adapter
from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.generation import complete
from bslora_convert.behaviour.model import BaseModel, load_base
from bslora_convert.behaviour.prompts import Example, Prompts, Row, encode
from bslora_convert.files.landing import replace_file
from bslora_convert.files.tensorfile import sha256
from bslora_convert.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows as tokens.

    rows: with a completion each, of which `written` are the reference's own. cut: how many were longer than the context.
    """

    examples: tuple[Example, ...]
    rows: tuple[Row, ...]
    written: int
    cut: int
    notes: tuple[str, ...]


class Workshop:
    """The base model with the original adapter on it, and the rows that were read for it."""

    def __init__(self, reference: Adapter, base_model: str, device: str, dtype: str, progress: Progress) -> None:
        """Loads the base model.

        :raises InputError: when it is missing or not the one that the adapter was made for.
        """
        progress("loading the base model", 0, 0)
        self.progress, self.adapter = progress, reference
        self.base: BaseModel = load_base(base_model, device, dtype)
        self.reference = Attached(self.base.model, reference.form, reference.carried, reference.path, enabled=False)

    def encode(self, prompts: Prompts, cache: Path | None = None) -> Rows:
        """Rows as tokens; the reference writes missing completions, greedily, once where there is a cache.

        :raises InputError: when nothing is left of a row.
        """
        rows, notes, name = prompts.rows, [], prompts.path.name
        missing = sum(row.completion is None for row in rows)
        if missing:
            settings = (prompts.max_new_tokens, prompts.chat_template)
            key = f"{sha256(prompts.path)} {self.adapter.sha256} {self.base.name} {settings}"
            with self.reference:
                rows, known = complete(
                    self.base, rows, _read_cache(cache, key), prompts.max_new_tokens, prompts.batch_size,
                    prompts.chat_template, self.progress,
                )  # fmt: skip
            if cache is not None:
                cache.parent.mkdir(parents=True, exist_ok=True)
                replace_file(cache, json.dumps({"key": key, "completions": known}))
            notes.append(f"{missing} rows of {name} had no completion; the reference wrote it, greedily")
        context = min(self.base.context, prompts.max_length or self.base.context)
        examples = tuple(encode(row, self.base.tokenizer, context, prompts.chat_template) for row in rows)
        cut = sum(example.cut for example in examples)
        if cut:
            notes.append(f"{cut} of {len(examples)} rows of {name} were cut to {context} tokens")
        return Rows(examples, rows, missing, cut, tuple(notes))


def open_workshop(
    source: str | Path,
    base_model: str,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = silent,
    beside: Adapter | None = None,
    scaling: Mapping[str, Any] | None = None,
) -> Workshop:
    """The base model with the adapter at `source` on it; beside: an adapter that must be of the same base.

    scaling: what `load_lora` is told of a configuration that lacks it.
    """
    reference = read_adapter(source, **(scaling or {}))
    if beside is not None:
        check_pair(beside, reference)
    return Workshop(reference, base_model, device, dtype, progress)


def _read_cache(cache: Path | None, key: str) -> dict[str, str]:
    """Completions by line that were written for the same rows, adapter and model; none where the file is another's."""
    if cache is None or not cache.is_file():
        return {}
    try:
        value = json.loads(cache.read_text(encoding="utf-8"))
        known = value["completions"] if value["key"] == key else {}
        return {str(line): str(text) for line, text in known.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
