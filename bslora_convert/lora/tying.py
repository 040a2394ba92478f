"""LoRA on an embedding whose weight is the head's too (`ensure_weight_tying`).

PEFT gives the tied head the embedding's own factors, transposed, and saves them a second time. Here the update is held once,
by the embedding, whose kind says that what is tied to it gets it as well.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from bslora_convert.errors import Refused
from bslora_convert.lora.config import LoraConfig
from bslora_convert.lora.module import LoraModule
from bslora_convert.lora.targets import EMBEDDING_LAYER_NAMES
from bslora_convert.modules.factors import Factors

USUAL_HEAD = "lm_head"
OLD_LANGUAGE = "language_model."  # what the names of older vision-language models begin with, the head's too


def tied(modules: Mapping[str, LoraModule], config: LoraConfig, path: Path) -> dict[str, LoraModule]:
    """The modules with each tied update once: embeddings say that they are tied, copies under the head are left out.

    A head that holds other factors was trained on a base that ties nothing: there all stays as it is.

    :raises Refused: when patterns scale the head's copy otherwise, which one update for both can't hold.
    """
    embeddings = {name: module for name, module in modules.items() if module.kind == "embedding"}
    heads = {name: module for name, module in modules.items() if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES}
    heads = {name: module for name, module in heads.items() if module.kind == "linear"}
    copies = {name for name, head in heads.items() if any(_is_copy(head, e) for e in embeddings.values())}
    if set(heads) - copies:
        return dict(modules)
    for name, embedding in embeddings.items():
        for head in copies or {head_of(name)}:
            scaling = config.scaling(head, config.expected_rank(head))
            if scaling != embedding.scaling:
                raise Refused(
                    f"{path}: ensure_weight_tying with patterns that scale {head} by {scaling:g} and {name}, which it is tied "
                    f"to, by {embedding.scaling:g}: one update can't be both"
                )
    return {
        name: replace(module, kind="tied_embedding") if name in embeddings else module
        for name, module in modules.items()
        if name not in copies
    }


def head_of(embedding: str) -> str:
    """What the head that an embedding's weight is tied to is called, as transformers has it."""
    return f"{OLD_LANGUAGE}{USUAL_HEAD}" if embedding.startswith(OLD_LANGUAGE) else USUAL_HEAD


def head_copy(embedding: Factors) -> Factors:
    """An embedding's update as PEFT saves it for the tied head: (vocabulary, r), (r, dim)."""
    return Factors(embedding.a.T, embedding.b.T)


def _is_copy(head: LoraModule, embedding: LoraModule) -> bool:
    """Whether a head's factors are an embedding's, transposed; of headers alone, whether they could be."""
    if head.a.shape != embedding.b.T.shape or head.b.shape != embedding.a.T.shape:
        return False
    if head.a.is_meta:
        return True
    return torch.equal(head.a, embedding.b.T) and torch.equal(head.b, embedding.a.T)
