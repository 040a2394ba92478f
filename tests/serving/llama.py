"""What llama.cpp answers, beside what a transformers model would."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

PROMPTS = [list(range(5, 20)), [7, 3, 200, 41, 41, 9], list(range(250, 210, -3))]
TOKENS = 12
EOS = 2

Answer = list[tuple[int, float]]


@dataclass(frozen=True)
class Difference:
    """equal: tokens that the model would have chosen too. largest: difference of a chosen token's log-probability."""

    equal: int
    largest: float


def answers(base: Path, adapter: Path | None = None) -> list[Answer]:
    """(token, log-probability) of each prompt's greedy continuation; flash attention, which rounds to halves, is off."""
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    asked = {"n_predict": TOKENS, "temperature": 0, "n_probs": 1, "cache_prompt": False, "ignore_eos": True}
    found = []
    for prompt in PROMPTS:
        done = server.handle_completions({"prompt": prompt, **asked})
        found.append([(token["id"], token["logprob"]) for token in done["choices"][0]["logprobs"]["content"]])
    return found


@torch.no_grad()
def difference(model: nn.Module, said: list[Answer]) -> Difference:
    """Each token of the answers beside what the model says at that place, given the same tokens before it."""
    equal, largest = 0, 0.0
    for prompt, answer in zip(PROMPTS, said, strict=True):
        ids = torch.tensor([prompt + [token for token, _ in answer]])
        logs = model(input_ids=ids).logits[0].float().log_softmax(-1)[len(prompt) - 1 : -1]
        assert len(logs) == len(answer) == TOKENS
        for row, (token, logprob) in zip(logs, answer, strict=True):
            row[EOS] = -torch.inf  # never given
            equal += int(row.argmax()) == token
            largest = max(largest, abs(float(row[token]) - logprob))
    return Difference(equal, largest)
