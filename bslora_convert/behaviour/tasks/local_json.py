"""What the task files beside this one read: local JSON, no download.

`--task-data DIR` names a directory with `<folder>/test.json` or `<folder>/test.jsonl` for each task: rows of {instruction, input,
output, answer} (the layout of AGI-Edgerunners/LLM-Adapters) or, for GSM8K, {question, answer}.
"""

import json
import re
from pathlib import Path
from typing import Any

import datasets

NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")
ANSWER_FORMAT = "Answer format:"


def read(folder: str, data: str | None = None, **_: Any) -> dict[str, Any]:
    """The test rows of one task; data: the directory that holds the folders."""
    if data is None:
        raise ValueError("this task reads local files: give their directory with --task-data")
    for name in ("test.json", "test.jsonl"):
        path = Path(data) / folder / name
        if path.is_file():
            content = path.read_text(encoding="utf-8")
            rows = json.loads(content) if name == "test.json" else [json.loads(line) for line in content.splitlines()]
            return {"test": datasets.Dataset.from_list(rows)}
    raise ValueError(f"{Path(data) / folder}: no test.json or test.jsonl")


def prompt(row: dict[str, Any]) -> str:
    """The instruction, or the question of GSM8K."""
    text = row.get("instruction") or row["question"]
    return f"{text}\n\n{row['input']}" if row.get("input") else str(text)


def choices(row: dict[str, Any]) -> list[str]:
    """Every allowed answer as the data's outputs say it; the instruction ends in `Answer format: a/b/c`."""
    allowed = row["instruction"].rpartition(ANSWER_FORMAT)[2].strip()
    return [f"the correct answer is {answer.strip()}" for answer in allowed.split("/")]


def target(row: dict[str, Any]) -> int:
    """Position of the right answer among the choices."""
    return choices(row).index(f"the correct answer is {row['answer']}")


def same_number(row: dict[str, Any], written: list[str]) -> dict[str, float]:
    """Whether the last number of what was written is the last number of the answer."""
    wanted, found = _last_number(str(row["answer"])), _last_number(written[0])
    return {"exact_match": float(found is not None and found == wanted)}


def _last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    return float(numbers[-1].replace(",", "").rstrip(".")) if numbers else None
