"""Base models that llama.cpp's converter takes over in a way that is known here, and what it does with their modules.

A module keeps its shape; its name becomes that of `gguf`'s table of names. Of the LLaMA family the converter changes the order of
the rows of q and k within each head, from halves (x₀ … x_{d/2-1} | x_{d/2} … x_{d-1}), as transformers turns them, to pairs
(x₀ x_{d/2} x₁ x_{d/2+1} …). ΔW = B A has the rows that B has, so B is put into the same order and A stays.

Read in llama.cpp's `conversion/` (llama.py, qwen.py, gemma.py, phi.py), and each run in llama.cpp by `tests/serving/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from bslora_convert.errors import InputError, Refused
from bslora_convert.files.jsonfile import read_json

CONFIG_NAME = "config.json"


@dataclass(frozen=True, slots=True)
class Architecture:
    """name: `general.architecture` of the base's file. turned: whether the rows of q and k change their order."""

    name: str
    turned: bool = False


ARCHITECTURES: dict[str, Architecture] = {  # by transformers' class
    "LlamaForCausalLM": Architecture("llama", turned=True),
    "MistralForCausalLM": Architecture("llama", turned=True),
    "Qwen2ForCausalLM": Architecture("qwen2"),
    "Qwen3ForCausalLM": Architecture("qwen3"),
    "GemmaForCausalLM": Architecture("gemma"),
    "Gemma2ForCausalLM": Architecture("gemma2"),
    "Gemma3ForCausalLM": Architecture("gemma3"),
    "Phi3ForCausalLM": Architecture("phi3"),
}


@dataclass(frozen=True, slots=True)
class Base:
    """What a file needs to know of the base model: its architecture, layers, and heads of q and of k."""

    architecture: Architecture
    layers: int
    heads: int
    key_heads: int
    tied: bool

    def turned(self, name: str, b: Tensor) -> Tensor:
        """B (out, r) of a module, its rows in the order of the base's file.

        :raises Refused: when its rows are no whole pairs a head.
        """
        heads = {"q_proj": self.heads, "k_proj": self.key_heads}.get(name.rpartition(".")[2])
        if not self.architecture.turned or heads is None:
            return b
        if b.shape[0] % (2 * heads):
            raise Refused(
                f"{name} has {b.shape[0]} rows, which {heads} heads can't share in pairs; another base was meant"
            )
        return b.reshape(heads, 2, -1, b.shape[1]).transpose(1, 2).reshape(b.shape)

    def unturned(self, name: str, b: Tensor) -> Tensor:
        """B as transformers has it, from the order of the base's file."""
        heads = {"q_proj": self.heads, "k_proj": self.key_heads}.get(name.rpartition(".")[2])
        if not self.architecture.turned or heads is None:
            return b
        return b.reshape(heads, -1, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)


def read_base(directory: str | Path) -> Base:
    """What a base model's `config.json` says; its weights are not read.

    :raises InputError: when it is missing or damaged. :raises Refused: for an architecture that is not in the list.
    """
    path = Path(directory) / CONFIG_NAME
    config = read_json(path)
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else None
    architecture = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if architecture is None:
        raise Refused(
            f"{path}: architectures is {classes!r}, and what llama.cpp's converter does with a model is known of "
            f"{', '.join(ARCHITECTURES)}; for another one `expand --rank uniform` writes what llama.cpp's own "
            "convert_lora_to_gguf.py takes"
        )
    heads = _whole(config, "num_attention_heads", path)
    key_heads = _whole(config, "num_key_value_heads", path) if config.get("num_key_value_heads") is not None else heads
    return Base(
        architecture,
        _whole(config, "num_hidden_layers", path),
        heads,
        key_heads,
        bool(config.get("tie_word_embeddings")),
    )


def _whole(config: Mapping[str, Any], field: str, path: Path) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 16:
        raise InputError(f"{path}: {field} is {value!r}, a positive whole number is expected")
    return value
