"""What a state of the base model that doesn't change predicts on some rows, each run once.

Kept are last hidden states at the measured positions, d numbers a token; logits, a vocabulary of numbers a token, are formed
from them each time, by the model's own head and whatever it does behind it.
"""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from bslora_convert.behaviour.memory import free_bytes
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.prompts import Batch, Example

USABLE = 0.25  # share of the memory that is free at first which hidden states may take

Key = tuple[tuple[int, ...], int]


class Known:
    """The original adapter on the base, or the bare base, and its last hidden states on the rows that were asked for so far."""

    def __init__(self, base: BaseModel, state: AbstractContextManager[Any], *, keep: bool = True) -> None:
        """state: as a context in which the model predicts what is meant. keep: whether rows will be asked for again."""
        self._base, self._state = base, state
        self._room = USABLE * free_bytes(base.device) if keep else 0.0
        self._hidden: dict[Key, Tensor] = {}
        self._prefixes: dict[tuple[int, ...], Any] = {}

    def predictions(self, batch: Batch, prefix: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Last hidden states (n, d) and logits (n, vocabulary) at the measured positions, as of `BaseModel.predictions`.

        prefix: tokens that every row of the batch begins with, read once.
        """
        kept = [self._hidden.get(_key(example)) for example in batch.examples]
        known = [hidden for hidden in kept if hidden is not None]
        if len(known) == len(kept):
            hidden = torch.cat(known)
            with self._state:
                return hidden, self._base.logits(hidden)
        with self._state:
            if prefix not in self._prefixes:
                self._prefixes = {prefix: self._base.read_prefix(prefix)}
            hidden, logits = self._base.predictions(batch, self._prefixes[prefix])
        self._keep(batch, hidden)
        return hidden, logits

    def _keep(self, batch: Batch, hidden: Tensor) -> None:
        """Keeps the hidden states of a batch's rows, where there is room."""
        if hidden.nbytes > self._room:
            return
        self._room -= hidden.nbytes
        for example, own in zip(batch.examples, hidden.split([one.measured for one in batch.examples]), strict=True):
            self._hidden[_key(example)] = own


def _key(example: Example) -> Key:
    return example.ids, example.start
