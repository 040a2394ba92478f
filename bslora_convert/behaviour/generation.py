"""Greedy generations, and how alike two texts are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.prompts import Row, encode_prompt

ROWS_FOR_ONE = 4  # a step of generation holds one position a row, so that many more rows fit


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
    texts: dict[int, str | None] = {}
    ordered = by_length(base, rows, chat_template)
    for start in range(0, len(ordered), batch_size * ROWS_FOR_ONE):
        part = ordered[start : start + batch_size * ROWS_FOR_ONE]
        texts |= zip(map(id, part), write(base, part, max_new_tokens, chat_template), strict=True)
        progress(start + len(part))
    return [texts[id(row)] or "" for row in rows]


def by_length(base: BaseModel, rows: Sequence[Row], chat_template: bool) -> list[Row]:
    """Rows from the shortest prompt to the longest, so that batches of neighbours hold little padding."""
    return sorted(rows, key=lambda row: len(encode_prompt(row, base.tokenizer, chat_template)))


@torch.inference_mode()
def write(
    base: BaseModel,
    rows: Sequence[Row],
    max_new_tokens: int,
    chat_template: bool,
    late: Callable[[], bool] | None = None,
) -> list[str | None]:
    """What the model writes after each of a few prompts, all at once.

    late: asked at every token whether to end; None stands for texts that had not come to their end by then.
    """
    longest = max(1, base.context - max_new_tokens)
    prompts = [encode_prompt(row, base.tokenizer, chat_template)[-longest:] for row in rows]
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), base.pad)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt) :] = torch.tensor(prompt)
        mask[place, width - len(prompt) :] = 1
    settings = _greedy(base, max_new_tokens)
    written = base.model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        generation_config=settings,
        stopping_criteria=_stopping(late) if late is not None else None,
    )[:, width:]
    ended = torch.isin(written, torch.tensor(settings.eos_token_id or [], device=written.device)).any(1)
    if written.shape[1] >= max_new_tokens or late is None:
        ended[:] = True
    texts = base.tokenizer.batch_decode(written, skip_special_tokens=True)
    return [text if whole else None for text, whole in zip(texts, ended.tolist(), strict=True)]


def _stopping(late: Callable[[], bool]) -> Any:
    """Ends all rows once it is too late."""
    from transformers import StoppingCriteriaList

    def ends(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(ids),), late(), device=ids.device)

    return StoppingCriteriaList([ends])


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
