"""Prompt files: every shape of row, and nothing hostile gets through."""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bslora_convert.behaviour.prompts import Example, Row, batches, encode, read_prompts, shared_prefix
from bslora_convert.errors import InputError
from tests.conftest import FIXTURES

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FIXTURES / "tiny" / "base")


def written(directory: Path, *rows: Any) -> Path:
    path = directory / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_every_shape_of_row(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    answer = {"role": "assistant", "content": "Hello"}
    rows = read_prompts(
        written(
            tmp_path,
            {"prompt": "Hi", "completion": "Hello"},
            {"messages": [*talk, answer]},
            "",
            {"messages": talk},
            {"prompt": talk, "completion": [answer]},
            {"instruction": "Add", "input": "1 2", "output": "3"},
            {"instruction": "Add", "input": "", "output": None, "answer": 3},
            {"text": "All of it"},
        )
    )
    assert [(row.line, row.completion) for row in rows] == [
        (1, "Hello"), (2, "Hello"), (4, None), (5, "Hello"), (6, "3"), (7, None), (8, "All of it")
    ]  # fmt: skip
    assert [row.prompt for row in rows] == ["Hi", "Hi", "Hi", "Hi", "Add\n\n1 2", "Add", ""]
    assert rows[1].messages == tuple(talk)


def test_gzip_arrays_and_limits(tmp_path: Path) -> None:
    rows = [{"text": f"number {index}"} for index in range(5)]
    (tmp_path / "rows.json").write_text("  " + json.dumps(rows))
    assert len(read_prompts(tmp_path / "rows.json")) == 5
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert [row.completion for row in read_prompts(tmp_path / "rows.jsonl.gz", 2)] == ["number 0", "number 1"]
    # What stands after the limit is not read.
    assert len(read_prompts(written(tmp_path, *rows, "{broken"), 5)) == 5


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ((), "holds no prompts"),
        (("{broken",), "line 1: not valid JSON"),
        (({"text": "a"}, "[1]"), "line 2: a JSON object is expected, found list"),
        (({"text": "a"}, {"text": "  "}), "line 2: the row has no text"),
        (({"prompt": ""},), "line 1: the row has no text; prompt and completion"),
        (({"answer": "a"},), "the row has no text"),
        (({"messages": []},), "the row has no text"),
        (({"messages": [{"role": "assistant", "content": "only me"}]},), "the row has no text"),
        (({"messages": "Hi"},), "messages is str"),
        (({"messages": [{"role": "user"}]},), "a message is an object with"),
        (({"prompt": 3},), "prompt is int"),
        (({"prompt": "a", "completion": ["b"]},), "completion is list"),
    ],
)
def test_rows_that_say_nothing_are_refused_with_their_line(tmp_path: Path, rows: tuple[Any, ...], words: str) -> None:
    with pytest.raises(InputError, match=r"rows\.jsonl") as caught:
        read_prompts(written(tmp_path, *rows))
    assert words in str(caught.value)


def test_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "nothing.jsonl")
    (tmp_path / "a.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(InputError, match="can't be read"):
        read_prompts(tmp_path / "a.jsonl.gz")
    whole = gzip.compress(b'{"text": "a"}\n' * 9999)
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="can't be read"):
        read_prompts(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "' + b"a" * (17 << 20) + b'"}')
    with pytest.raises(InputError, match="line 1 is longer"):
        read_prompts(tmp_path / "c.jsonl")


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200) | st.text(alphabet='{}[]":,aptext1\\u \n', max_size=80).map(str.encode))
def test_any_bytes_are_rows_or_an_input_error(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "rows.jsonl"
        path.write_bytes(content)
        try:
            assert read_prompts(path)
        except InputError as error:
            assert str(path) in str(error)


def test_what_is_measured_is_the_completion(tokenizer: Any) -> None:
    row = Row(1, ({"role": "user", "content": "Question: 1 + 1?"},), " 2")
    example = encode(row, tokenizer, 512, chat_template=True)  # the tokenizer has no template
    assert tokenizer.decode(example.ids[: example.start]) == "Question: 1 + 1?"
    assert tokenizer.decode(example.ids[example.start :]) == " 2<|end|>"
    tokenizer.chat_template = TEMPLATE
    try:
        example = encode(row, tokenizer, 512, chat_template=True)
        assert tokenizer.decode(example.ids) == "[user]Question: 1 + 1?\n[assistant] 2<|end|>"
        assert tokenizer.decode(example.ids[example.start :]) == " 2<|end|>"
        plain = encode(row, tokenizer, 512, chat_template=False)
        assert tokenizer.decode(plain.ids) == "Question: 1 + 1? 2<|end|>"
    finally:
        tokenizer.chat_template = None
    text = encode(Row(1, (), "To be or not"), tokenizer, 512, chat_template=True)
    assert text.start == 1
    assert tokenizer.decode(text.ids) == "To be or not"


def test_what_is_too_long_is_cut_from_the_prompts_beginning(tokenizer: Any) -> None:
    row = Row(1, ({"role": "user", "content": "far away " * 50 + "the end"},), " short")
    whole, cut = (encode(row, tokenizer, context, chat_template=False) for context in (4096, 12))
    assert not whole.cut
    assert cut.cut
    assert len(cut.ids) == 12
    assert cut.ids == whole.ids[-12:]
    long = encode(Row(1, row.messages, " word" * 99), tokenizer, 12, chat_template=False)
    assert (long.start, len(long.ids)) == (1, 12)
    with pytest.raises(InputError, match="line 1 has no token to measure"):
        encode(Row(1, (), "a"), tokenizer, 12, chat_template=False)


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=9),
    size=st.integers(1, 5),
    common=st.integers(0, 12),
)
def test_batches_hold_every_example_once_and_point_at_its_tokens(
    shapes: list[tuple[int, int]], size: int, common: int
) -> None:
    start = tuple(range(100, 100 + common))
    examples = [
        Example(Row(line, (), ""), (*start, *range(line * 20, line * 20 + prompt + completion)), common + prompt, False)
        for line, (prompt, completion) in enumerate(shapes, 10)
    ]
    seen = []
    for batch in batches(examples, size, pad=0):
        assert len(batch.examples) <= size
        assert batch.targets.shape == batch.rows.shape == (int(batch.predicts.sum()),)
        for index, example in enumerate(batch.examples):
            length = len(example.ids)
            assert tuple(batch.ids[index, :length].tolist()) == example.ids
            assert batch.mask[index].sum() == length
            assert tuple(batch.targets[batch.rows == index].tolist()) == example.ids[example.start :]
            predicting = batch.predicts[index].nonzero()[:, 0]
            assert torch.equal(batch.ids[index, predicting + 1], batch.targets[batch.rows == index])
            seen.append(example.row.line)
    assert sorted(seen) == [example.row.line for example in examples]
    prefix = shared_prefix(examples)
    assert all(example.ids[: len(prefix)] == prefix and len(prefix) < example.start for example in examples)
    assert len(prefix) >= common or common < 8
