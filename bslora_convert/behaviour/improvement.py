"""What the base model can do for a fitted form: calibration, then distillation, on one base in memory.

Both are optional and neither can make the result worse on the rows that they hold out.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bslora_convert.behaviour.adapter import Adapter, check_pair, read_adapter
from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.calibrate import collect
from bslora_convert.behaviour.distill import Distilled, distill, heldout_kl, split_heldout
from bslora_convert.behaviour.generation import complete
from bslora_convert.behaviour.model import BaseModel, load_base
from bslora_convert.behaviour.prompts import Example, encode, read_prompts
from bslora_convert.behaviour.training import Training
from bslora_convert.bslora.factors import Factors
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.fit.calibrated import refit_locals, residual_terms
from bslora_convert.fit.lowrank import Delta
from bslora_convert.tensorfile import sha256

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Prompts:
    """A file of rows and how to read it."""

    path: Path
    limit: int | None = None
    max_length: int | None = None
    max_new_tokens: int = 128
    chat_template: bool = True
    batch_size: int = 8


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

    def examples(self, prompts: Prompts, cache: Path | None = None) -> tuple[list[Example], list[str]]:
        """A file's rows as tokens, and notes; the reference writes missing completions, once where there is a cache.

        :raises InputError: when the file is missing, damaged or empty.
        """
        rows = read_prompts(prompts.path, prompts.limit)
        notes = []
        key = f"{sha256(prompts.path)} {self.adapter.sha256} {self.base.name} {prompts}"
        missing = sum(row.completion is None for row in rows)
        if missing:
            known = _read_cache(cache, key)
            with self.reference:
                rows, known = complete(
                    self.base,
                    rows,
                    known,
                    prompts.max_new_tokens,
                    prompts.batch_size,
                    prompts.chat_template,
                    self.progress,
                )
            if cache is not None:
                cache.parent.mkdir(parents=True, exist_ok=True)
                cache.write_text(json.dumps({"key": key, "completions": known}), encoding="utf-8")
            notes.append(f"{missing} rows of {prompts.path.name} had no completion; the reference wrote it, greedily")
        context = min(self.base.context, prompts.max_length or self.base.context)
        examples = [encode(row, self.base.tokenizer, context, prompts.chat_template) for row in rows]
        cut = sum(example.cut for example in examples)
        if cut:
            notes.append(f"{cut} of {len(examples)} rows of {prompts.path.name} were cut to {context} tokens")
        return examples, notes

    def calibrate(
        self, form: BsloraForm, deltas: Mapping[str, Delta], prompts: Prompts, metric: str, uniform: bool, seed: int
    ) -> tuple[BsloraForm, dict[str, Any], list[str]]:
        """The form with its local parts refitted in the prompts' metric, or as it was where that is no better held out."""
        examples, notes = self.examples(prompts)
        fitted, held = split_heldout(examples, Training(heldout=0.1, seed=seed))
        terms = residual_terms(deltas, form)
        stacked = {
            name: Factors(torch.cat([part.b for part in parts], 1), torch.cat([part.a for part in parts], 0))
            for name, parts in terms.items()
        }
        moments = collect(
            self.base, self.reference, stacked, fitted, prompts.batch_size, metric,
            lambda done: self.progress("calibrating", done, len(fitted)),
        )  # fmt: skip
        refitted = refit_locals(form, terms, moments, uniform)
        self.progress("measuring both fits", 0, 0)
        kl = {}
        for name, candidate in (("data_free", form), ("calibrated", refitted)):
            attached = Attached(self.base.model, candidate, {}, name, enabled=False)
            kl[name] = heldout_kl(self.base, self.reference, attached, held, prompts.batch_size)
            attached.remove()
        kept = min(kl, key=lambda name: kl[name])
        record = {
            "metric": metric,
            "rows": len(fitted),
            "tokens": sum(len(example.ids) for example in fitted),
            "heldout_rows": len(held),
            "heldout_kl": kl,
            "kept": kept,
        }
        if kept == "data_free":
            notes.append("the calibrated fit was no better on the held-out rows; the data-free one is kept")
        return (refitted if kept == "calibrated" else form), record, notes

    def distill(
        self,
        form: BsloraForm,
        prompts: Prompts,
        training: Training,
        *,
        heldout: Path | None = None,
        checkpoints: Path | None = None,
        resume: bool = False,
        began: float | None = None,
    ) -> Distilled:
        """The form trained against the reference."""
        began = began or time.perf_counter()
        cache = checkpoints.with_name(f"{checkpoints.name}.completions.json") if checkpoints else None
        examples, notes = self.examples(prompts, cache)
        if heldout is None:
            examples, held = split_heldout(examples, training)
        else:
            held, more = self.examples(
                Prompts(heldout, training.max_heldout, prompts.max_length, prompts.max_new_tokens, prompts.chat_template,
                        prompts.batch_size)
            )  # fmt: skip
            notes += more
        done = distill(
            self.base, self.reference, form, examples, held, training,
            checkpoints=checkpoints, resume=resume, began=began, progress=self.progress,
        )  # fmt: skip
        return Distilled(done.form, done.log, done.record, (*notes, *done.notes))


def open_workshop(
    source: str | Path,
    base_model: str,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress = lambda *_: None,
    beside: Adapter | None = None,
) -> Workshop:
    """The base model with the adapter at `source` on it; beside: an adapter that must be of the same base."""
    reference = read_adapter(source)
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
