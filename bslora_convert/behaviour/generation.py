"""Greedy generations, and how alike two texts are."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.prompts import Row, encode_prompt, with_completion
from bslora_convert.progress import Progress, silent

ROWS_FOR_ONE = 4  # a step of generation holds one position a row, so that many more rows fit


@torch.inference_mode()
def generate(
    base: BaseModel,
    rows: Sequence[Row],
    max_new_tokens: int,
    batch_size: int,
    chat_template: bool,
    progress: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """What the model, with whatever is active on it, writes after each prompt; greedy, so the same every time.

    batch_size: rows of whole sequences that fit at once.
    """
    batch_size *= ROWS_FOR_ONE
    texts = [""] * len(rows)
    longest = max(1, base.context - max_new_tokens)
    prompts = [encode_prompt(row, base.tokenizer, chat_template)[-longest:] for row in rows]
    order = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in part)
        ids = torch.full((len(part), width), base.pad)
        mask = torch.zeros((len(part), width), dtype=torch.long)
        for place, index in enumerate(part):
            length = len(prompts[index])
            ids[place, width - length :] = torch.tensor(prompts[index])
            mask[place, width - length :] = 1
        written = base.model.generate(
            input_ids=ids.to(base.device),
            attention_mask=mask.to(base.device),
            generation_config=_greedy(base, max_new_tokens),
        )
        for place, index in enumerate(part):
            texts[index] = base.tokenizer.decode(written[place, width:], skip_special_tokens=True)
        progress(start + len(part))
    return texts


def complete(
    base: BaseModel,
    rows: Sequence[Row],
    known: Mapping[str, str],
    max_new_tokens: int,
    batch_size: int,
    chat_template: bool,
    progress: Progress = silent,
) -> tuple[tuple[Row, ...], dict[str, str]]:
    """Rows with a completion each, and every completion that was written, by line; `known` ones are not written again."""
    missing = [row for row in rows if row.completion is None and str(row.line) not in known]
    texts = generate(
        base, missing, max_new_tokens, batch_size, chat_template,
        lambda done: progress("writing completions", done, len(missing)),
    )  # fmt: skip
    written = {**known, **{str(row.line): text for row, text in zip(missing, texts, strict=True)}}
    whole = (row if row.completion is not None else with_completion(row, written[str(row.line)]) for row in rows)
    return tuple(whole), written


def _greedy(base: BaseModel, max_new_tokens: int) -> Any:
    """The model's stop tokens and nothing else of its sampling settings."""
    from transformers import GenerationConfig

    stops = base.model.generation_config.eos_token_id
    stops = list(stops) if isinstance(stops, (list, tuple)) else [stops]
    stops = sorted({token for token in (*stops, base.tokenizer.eos_token_id) if token is not None})
    return GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=base.pad, eos_token_id=stops or None
    )


def rouge_l(reference: str, candidate: str) -> float:
    """ROUGE-L F1 over words (Lin, 2004, section 3): 2 l / (m + n), l the longest common subsequence's length."""
    first, second = reference.split(), candidate.split()
    if not first or not second:
        return float(first == second)
    lengths = [0] * (len(second) + 1)
    for word in first:
        diagonal = 0
        for index, other in enumerate(second, 1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if word == other else max(above, lengths[index - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(first) + len(second))
