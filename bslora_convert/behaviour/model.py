"""The base model with its tokenizer, read once and shared by everything that is measured on it."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bslora_convert.behaviour.prompts import Batch
from bslora_convert.errors import InputError, reason_of
from bslora_convert.files.base import check_base
from bslora_convert.fit.device import pick_device
from bslora_convert.recipe.checks import check_choice
from bslora_convert.recipe.storage import DTYPES


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A causal language model of transformers and its tokenizer."""

    name: str
    model: Any
    tokenizer: Any
    device: torch.device

    @property
    def context(self) -> int:
        """The longest sequence that the model takes."""
        limits = [getattr(self.model.config, "max_position_embeddings", None), self.tokenizer.model_max_length]
        return min(int(limit) for limit in limits if limit)

    @property
    def pad(self) -> int:
        """The token that fills batches; masked, so that any will do."""
        token = self.tokenizer.pad_token_id
        return int(token if token is not None else self.tokenizer.eos_token_id or 0)

    @torch.inference_mode()
    def read_prefix(self, ids: tuple[int, ...]) -> Any:
        """The cache of tokens that many prompts begin with, read once; None where there are none or it can't be repeated."""
        if not ids:
            return None
        cache = self.model(input_ids=torch.tensor([ids], device=self.device), use_cache=True).past_key_values
        return cache if hasattr(cache, "batch_repeat_interleave") else None

    def predictions(self, batch: Batch, prefix: Any = None, gradients: bool = False) -> tuple[Tensor, Tensor]:
        """Last hidden states (n, d) and logits (n, vocabulary) at the measured positions only; the rest is never formed.

        prefix: from `read_prefix`, of tokens that every row of the batch begins with. gradients: for training.
        """
        head = self.model.get_output_embeddings()
        kept: list[Tensor] = []
        known, cache = 0, None
        if prefix is not None:
            known, cache = prefix.get_seq_length(), copy.deepcopy(prefix)
            cache.batch_repeat_interleave(len(batch.ids))

        def select(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            kept.append(inputs[0][batch.predicts[:, known:].to(inputs[0].device)])
            return (kept[0][None],)

        handle = head.register_forward_pre_hook(select)
        state = nullcontext() if gradients else torch.inference_mode()
        try:
            with state:
                output = self.model(
                    input_ids=batch.ids[:, known:].to(self.device),
                    attention_mask=batch.mask.to(self.device),
                    past_key_values=cache,
                    use_cache=cache is not None,
                )
        finally:
            handle.remove()
        return kept[0], output.logits[0]

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, vocabulary) of last hidden states (n, d), as the model forms them: its head, and what it does behind it."""
        head = self.model.get_output_embeddings()
        handle = head.register_forward_pre_hook(lambda *_: (hidden[None],))
        try:
            output = self.model(input_ids=torch.tensor([[self.pad]], device=self.device), use_cache=False)
        finally:
            handle.remove()
        logits: Tensor = output.logits[0]
        return logits


def load_base(
    name: str | Path,
    device: str = "auto",
    dtype: str = "auto",
    fits: Callable[[nn.Module], None] = lambda _: None,
) -> BaseModel:
    """Loads a directory or a hub's name; dtype auto = float32 on a CPU, the model's own on a GPU.

    fits: sees the model before its weights are read, and raises where it is not the one that is needed.

    :raises InputError: when there is no such model, or it is not a causal language model with a tokenizer.
    :raises RecipeError: for a device or dtype that can't be had, or without the packages that run a model.
    """
    check_choice("dtype", dtype, DTYPES)
    place = pick_device(device)
    check_base(name)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    wanted = ("float32" if place.type == "cpu" else "auto") if dtype == "auto" else dtype
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
        fits(empty)
        model: Any = AutoModelForCausalLM.from_pretrained(
            name, dtype=wanted if wanted == "auto" else getattr(torch, wanted)
        )
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"base model {name}: can't be loaded ({reason_of(error)})") from None
    if model.get_output_embeddings() is None:
        raise InputError(f"base model {name}: no output embeddings; a causal language model is expected")
    return BaseModel(str(name), model.to(place).eval().requires_grad_(False), tokenizer, place)
