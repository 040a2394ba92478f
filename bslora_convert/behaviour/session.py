"""The base model with the original adapter on it, and the rows that are read for them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from torch import nn

from bslora_convert.behaviour.adapter import Adapter
from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.divergence import Divergence, diverge_all
from bslora_convert.behaviour.known import Known
from bslora_convert.behaviour.loaded import take_base
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.prompts import Example, Prompts, Row, encode, with_completion
from bslora_convert.behaviour.writing import Writing, complete
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.layout import Layout
from bslora_convert.files.hashing import sha256
from bslora_convert.layers.shapes import check_fits
from bslora_convert.process.progress import Progress, silent


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """Rows as tokens.

    rows: with a completion each, of which `written` are the reference's own. left_out: how many it had no time for.
    cut: how many were longer than the context.
    """

    examples: tuple[Example, ...]
    rows: tuple[Row, ...]
    written: int
    left_out: int
    cut: int
    notes: tuple[str, ...]


class BaseModelSession:
    """The base model with the original adapter on it; as a context, it leaves the base model as it was.

    known, bare: what the original and the base alone predict, each row run once.
    """

    def __init__(
        self,
        reference: Adapter,
        base_model: str,
        device: str = "auto",
        dtype: str = "auto",
        progress: Progress = silent,
    ) -> None:
        """Loads the base model. reference: the original adapter.

        :raises InputError: when it is missing or not the one that the adapter was made for.
        """
        progress("loading the base model")
        self.progress, self.adapter = progress, reference
        modules = Layout.of(reference.form).modules

        def fits(model: nn.Module) -> None:
            check_fits(modules, model, reference.path)

        self.base: BaseModel = take_base(base_model, device, dtype, fits)
        self.reference = Attached(self.base.model, reference.form, reference.carried, reference.path, enabled=False)
        self.known, self.bare = Known(self.base, self.reference), Known(self.base, nullcontext())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the base model as it was, for whoever comes next."""
        self.reference.remove()
        self.base.model.eval()  # where activations were recomputed, its layers were in training mode

    def encode(self, prompts: Prompts, writing: Writing | None = None) -> EncodedRows:
        """Rows as tokens; the reference writes missing completions, greedily, each once where they are kept.

        :raises InputError: when nothing is left of a row.
        """
        rows, notes, name = prompts.rows, [], prompts.path.name
        missing = sum(row.completion is None for row in rows)
        if missing:
            settings = (prompts.max_new_tokens, prompts.chat_template)
            key = f"{sha256(prompts.path)} {self.adapter.sha256} {self.base.name} {settings}"
            with self.reference:
                texts = complete(self.base, prompts, key, writing or Writing(), self.progress)
            whole = [row if row.completion is not None else with_completion(row, texts.get(row.line)) for row in rows]
            rows = tuple(row for row in whole if row.completion is not None)
            notes.append(f"{missing} rows of {name} had no completion; the reference wrote it, greedily")
        left_out = len(prompts.rows) - len(rows)
        if left_out:
            notes[-1] += f", for {missing - left_out} of them in the time there was; the other {left_out} are left out"
        context = min(self.base.context, prompts.max_length or self.base.context)
        examples = tuple(encode(row, self.base.tokenizer, context, prompts.chat_template) for row in rows)
        cut = sum(example.cut for example in examples)
        if cut:
            notes.append(f"{cut} of {len(examples)} rows of {name} were cut to {context} tokens")
        return EncodedRows(examples, rows, missing - left_out, left_out, cut, tuple(notes))

    def measure(
        self, forms: Mapping[str, BsloraForm], examples: Sequence[Example], batch_size: int, phase: str, before: int = 0,
        total: int | None = None,
    ) -> dict[str, Divergence]:  # fmt: skip
        """How forms, attached side by side, predict on some rows against the original, by the forms' names.

        phase: what progress says. before, total: rows that were measured before this call, and those of all calls.
        """
        model, carried = self.base.model, self.adapter.carried
        attached = {name: Attached(model, form, carried, name, enabled=False) for name, form in forms.items()}
        whole = len(forms) * len(examples) if total is None else total

        def tell(done: int) -> None:
            self.progress(phase, before + len(forms) * done, whole)

        try:
            return diverge_all(self.base, self.known, self.bare, attached, examples, batch_size, tell)
        finally:
            for one in attached.values():
                one.remove()
