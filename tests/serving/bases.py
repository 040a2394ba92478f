"""Base models as llama.cpp reads them: a transformers model's weights in a GGUF file of float32, by the project's own table."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from bslora_convert.serving.gguf import read_base

SHIFTED = ("gemma", "gemma2", "gemma3")  # whose norms transformers adds one to


def write_base(model: Any, directory: Path, path: Path, vocabulary: Callable[[Any], None] | None = None) -> Path:
    """The model whose configuration lies in `directory` as one file; without a vocabulary tokens are mere numbers."""
    config, base = model.config, read_base(directory)
    arch = base.architecture.name
    writer = gguf.GGUFWriter(path, arch)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(base.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(base.heads)
    writer.add_head_count_kv(base.key_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(theta(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if arch in ("gemma2", "gemma3"):
        writer.add_sliding_window(config.sliding_window)
    if arch == "phi3":
        writer.add_sliding_window(0)
        writer.add_rope_scaling_orig_ctx_len(config.max_position_embeddings)
    if vocabulary is None:
        add_tokens(writer, config.vocab_size)
    else:
        vocabulary(writer)
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[arch], base.layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and base.tied:
            continue
        module, _, end = name.rpartition(".")
        known = table.get_name(module)
        assert known, name
        writer.add_tensor(f"{known}.{end}", in_order(base, arch, name, tensor.float()).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def in_order(base: Any, arch: str, name: str, tensor: Tensor) -> Tensor:
    if arch in SHIFTED and name.endswith("norm.weight"):
        return tensor + 1
    heads = {"q_proj": base.heads, "k_proj": base.key_heads}.get(name.split(".")[-2])
    if arch != "llama" or heads is None:
        return tensor
    rows = torch.arange(tensor.shape[0]).reshape(heads, 2, -1).transpose(1, 2).flatten()  # pair by pair
    return tensor[rows]


def theta(config: Any) -> float:
    found = getattr(config, "rope_parameters", None) or {}
    found = found.get("full_attention", found)
    return float(found.get("rope_theta", getattr(config, "rope_theta", 10000.0)))


def add_tokens(writer: Any, count: int) -> None:
    """Numbered tokens: whole characters each, for llama.cpp keeps back what is not."""
    names = ["<unk>", "<s>", "</s>", "<0x0A>", *(f"t{number}" for number in range(4, count))]
    special = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL, gguf.TokenType.BYTE]
    kinds = [*special, *[gguf.TokenType.NORMAL] * (count - len(special))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(names)
    writer.add_token_scores([0.0] * count)
    writer.add_token_types([int(kind) for kind in kinds])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
