"""Prompt files: rows of four shapes, read without trust, and the token sequences that they become.

    {"prompt": …, "completion": …}     {"messages": [{"role": …, "content": …}, …]}
    {"instruction": …, "input": …, "output": …}     {"text": …}

A row's completion is what behaviour is measured on: the completion, the last assistant message, the output, or for a plain text
everything after its first token. Rows may come without one; then the reference adapter writes it.
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.errors import InputError
from bslora_convert.recipe.checks import check_count

LONGEST_LINE = 16 << 20
SHORTEST_PREFIX = 8
SHAPES = "prompt and completion, messages, instruction and output, or text"


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt: a conversation up to the completion (empty for a plain text), and the completion if the file has one."""

    line: int
    messages: tuple[Mapping[str, str], ...]
    completion: str | None

    @property
    def prompt(self) -> str:
        """The last message, for a reader."""
        return self.messages[-1]["content"] if self.messages else ""


@dataclass(frozen=True, slots=True)
class Prompts:
    """The rows of a file and how to turn them into tokens."""

    path: Path
    rows: tuple[Row, ...]
    max_length: int | None = None
    max_new_tokens: int = 128
    chat_template: bool = True
    batch_size: int = 8

    @classmethod
    def read(cls, path: str | Path, limit: int | None = None, **settings: Any) -> "Prompts":
        """The first `limit` rows of a file.

        :raises InputError: when it is missing, damaged or empty.
        """
        return cls(Path(path), tuple(read_prompts(path, limit)), **settings)


@dataclass(frozen=True, slots=True)
class Example:
    """A row as tokens: ids[start:] are measured. `cut`: the row was longer than the context."""

    row: Row
    ids: tuple[int, ...]
    start: int
    cut: bool

    @property
    def measured(self) -> int:
        """Tokens that are measured."""
        return len(self.ids) - self.start


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples padded to one length.

    ids, mask: (b, t). predicts: (b, t), the positions whose next token is measured; targets: (n,), those tokens, row by row.
    rows: (n,), the example in the batch that each measured token belongs to.
    """

    examples: tuple[Example, ...]
    ids: Tensor
    mask: Tensor
    predicts: Tensor
    targets: Tensor
    rows: Tensor


def read_prompts(path: str | Path, limit: int | None = None) -> list[Row]:
    """The first rows of a JSONL file, gzip accepted; a JSON array of rows is read as well.

    :raises InputError: naming file and line, for a missing or empty file, damaged JSON or a row without text.
    :raises RecipeError: for a limit that leaves nothing.
    """
    path = Path(path)
    check_count("limit", limit)
    if not path.is_file():
        raise InputError(f"{path}: no such file; a JSONL file of prompts is expected")
    rows = [_parse(value, f"{path}: line {line}", line) for line, value in islice(_values(path), limit)]
    if not rows:
        raise InputError(f"{path}: holds no prompts; one JSON object a line is expected")
    return rows


def encode(row: Row, tokenizer: Any, context: int, chat_template: bool) -> Example:
    """A row that has its completion, as tokens.

    What is longer than `context` loses the beginning of its prompt first, then the end of its completion.

    :raises InputError: when nothing is left to measure.
    """
    prompt = encode_prompt(row, tokenizer, chat_template)
    completion = [] if row.completion is None else tokenizer(row.completion, add_special_tokens=False)["input_ids"]
    if not row.messages:  # a plain text is measured from its second token on
        prompt, completion = prompt + completion[:1], completion[1:]
    elif tokenizer.eos_token_id is not None:
        completion = [*completion, tokenizer.eos_token_id]
    cut = len(prompt) + len(completion) > context
    if cut:
        completion = completion[: context - 1]
        prompt = prompt[-(context - len(completion)) :]
    if not prompt or not completion:
        raise InputError(f"the row of line {row.line} has no token to measure; it needs {SHAPES}")
    return Example(row, (*prompt, *completion), len(prompt), cut)


def encode_prompt(row: Row, tokenizer: Any, chat_template: bool) -> list[int]:
    """The tokens before the completion, up to where the model begins to write."""
    if not row.messages:
        return [tokenizer.bos_token_id] if _adds_bos(tokenizer) else []
    if chat_template and tokenizer.chat_template:
        text = tokenizer.apply_chat_template(list(row.messages), tokenize=False, add_generation_prompt=True)
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
    text = "\n\n".join(message["content"] for message in row.messages)
    plain: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [tokenizer.bos_token_id, *plain] if _adds_bos(tokenizer) else plain


def with_completion(row: Row, completion: str | None) -> Row:
    """The row with a completion that was written for it, if one was."""
    return replace(row, completion=completion)


def shared_prefix(examples: Sequence[Example]) -> tuple[int, ...]:
    """The tokens that all prompts begin with (a system prompt, as a rule); empty where they are too few to be worth it."""
    first = min(examples, key=lambda example: example.start).ids
    length = min(example.start for example in examples) - 1  # the first measured token's position stays outside
    for example in examples:
        while first[:length] != example.ids[:length]:
            length -= 1
    return first[:length] if length >= SHORTEST_PREFIX else ()


def batches(examples: Sequence[Example], size: int, pad: int) -> Iterator[Batch]:
    """Examples of like length together, each batch padded on the right."""
    ordered = sorted(
        examples, key=lambda example: -len(example.ids)
    )  # the largest first: memory runs out early or never
    for start in range(0, len(ordered), size):
        yield _batch(tuple(ordered[start : start + size]), pad)


def _batch(examples: tuple[Example, ...], pad: int) -> Batch:
    longest = max(len(example.ids) for example in examples)
    ids = torch.full((len(examples), longest), pad)
    mask = torch.zeros((len(examples), longest), dtype=torch.long)
    predicts = torch.zeros((len(examples), longest), dtype=torch.bool)
    for index, example in enumerate(examples):
        length = len(example.ids)
        ids[index, :length] = torch.tensor(example.ids)
        mask[index, :length] = 1
        predicts[index, example.start - 1 : length - 1] = True
    targets = torch.cat([torch.tensor(example.ids[example.start :]) for example in examples])
    rows = predicts.nonzero()[:, 0]
    return Batch(examples, ids, mask, predicts, targets, rows)


def _adds_bos(tokenizer: Any) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Each row's JSON with its line."""
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            first = file.read(1)
            while first.isspace():
                first = file.read(1)
            file.seek(0)
            if first == b"[":
                yield from enumerate(_array(path, file.read(LONGEST_LINE + 1)), 1)
                return
            number = 0
            while content := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(content) > LONGEST_LINE:
                    raise InputError(f"{path}: line {number} is longer than {LONGEST_LINE} bytes")
                if content.strip():
                    yield number, _json(content, f"{path}: line {number}")
        except (OSError, EOFError) as error:  # gzip's own complaints among them
            raise InputError(f"{path}: can't be read ({error})") from None


def _array(path: Path, content: bytes) -> list[Any]:
    if len(content) > LONGEST_LINE:
        raise InputError(f"{path}: a JSON array of more than {LONGEST_LINE} bytes; one object a line is expected")
    value = _json(content, str(path))
    return value if isinstance(value, list) else [value]


def _json(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error})") from None


def _parse(value: Any, where: str, line: int) -> Row:
    if not isinstance(value, dict):
        raise InputError(f"{where}: a JSON object is expected, found {type(value).__name__}")
    if "messages" in value or isinstance(value.get("prompt"), list):
        messages = [
            *_messages(value.get("messages", value.get("prompt")), where),
            *_messages(value.get("completion") or [], where),
        ]
        last = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else None
        if messages:
            return Row(line, tuple(messages), last)
    elif prompt := _text(value, "prompt", where):
        return Row(line, (_user(prompt),), _text(value, "completion", where))
    elif instruction := _text(value, "instruction", where):
        extra = _text(value, "input", where)
        return Row(
            line,
            (_user(f"{instruction}\n\n{extra}" if extra else instruction),),
            _text(value, "output", where),
        )
    elif text := _text(value, "text", where):
        return Row(line, (), text)
    raise InputError(f"{where}: the row has no text; {SHAPES} is expected")


def _text(value: Mapping[str, Any], key: str, where: str) -> str | None:
    """A field's text; None where it is missing, null or blank."""
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: {key} is {type(text).__name__}, text is expected")
    return text if text and text.strip() else None


def _messages(value: Any, where: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise InputError(f"{where}: messages is {type(value).__name__}, a list is expected")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f"{where}: a message is an object with a role and a content that is text")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
