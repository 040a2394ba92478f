"""Completions that the reference writes for rows without one: in which order, until when, and kept as they are written.

Without a deadline rows of like length are written together. With one they are written in the order that training needs them, in
parts that double, so that little is lost where the time runs out in the midst of a part; rows that are not done then are left
out.
"""

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bslora_convert.behaviour.generation import ROWS_FOR_ONE, by_length, write
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.processes import from_first
from bslora_convert.behaviour.prompts import Prompts, Row
from bslora_convert.files.landing import replace_file
from bslora_convert.process.progress import Progress, silent

SHARE = 1 / 3  # of the time that is left, for writing
ENOUGH = 8  # held-out rows that choose a state well enough, so they come first
LEAST = 2  # rows that are written however late it is: one to train on and one held out


@dataclass(frozen=True, slots=True)
class Writing:
    """How completions are written.

    directory: where they are kept as they are written. deadline: by `clock`, when writing ends. order: lines as they are needed.
    closed: nothing is written that is not kept yet, where anything is: a run that goes on has the rows that it began with.
    """

    directory: Path | None = None
    deadline: float = math.inf
    order: tuple[int, ...] = ()
    closed: bool = False
    clock: Callable[[], float] = time.perf_counter

    def kept_in(self, key: str) -> Path | None:
        """The file of the completions that `key` decides."""
        if self.directory is None:
            return None
        return self.directory / f"completions-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def deadline_of(began: float, minutes: float | None, clock: Callable[[], float] = time.perf_counter) -> float:
    """When writing ends: after its share of what is left of the minutes, which count from `began`."""
    if minutes is None:
        return math.inf
    now = clock()
    return now + SHARE * max(0.0, began + 60 * minutes - now)


def order_of_need(train: Sequence[Row], held: Sequence[Row], seed: int) -> tuple[int, ...]:
    """Lines in the order that training needs them: one of each, enough held-out ones, then the rest of both side by side.

    Rows of each kind are drawn with the seed, so that those written in time stand for all of them.
    """
    training, choosing = _drawn(train, seed), _drawn(held, seed)
    first = [*choosing[:1], *training[:1], *choosing[1:ENOUGH]]
    rest = [
        ((place + 0.5) / len(lines), line)
        for lines in (choosing[ENOUGH:], training[1:])
        for place, line in enumerate(lines)
    ]
    return (*first, *(line for _, line in sorted(rest)))


def complete(
    base: BaseModel, prompts: Prompts, key: str, writing: Writing, progress: Progress = silent
) -> dict[int, str]:
    """Completions by line, for every row without one or as many as there was time for.

    key: what they depend on beside the rows; those that were kept for the same key are not written again.
    """
    missing = {row.line: row for row in prompts.rows if row.completion is None}
    path = writing.kept_in(key)
    known = {line: text for line, text in _kept(path, key).items() if line in missing}
    if not (writing.closed and known):
        for part, late in _parts(base, missing, prompts, writing):
            rows = [row for row in part if row.line not in known]
            if not rows:
                continue
            if late is not None and late():
                break
            progress("writing completions", len(known), len(missing))
            texts = write(base, rows, prompts.max_new_tokens, prompts.chat_template, late)
            known |= {row.line: text for row, text in zip(rows, texts, strict=True) if text is not None}
            if path is not None:
                _keep(path, key, known)
        progress("writing completions", len(known), len(missing))
    return known if writing.deadline == math.inf else from_first(known, cpu=base.device.type == "cpu")


def _parts(
    base: BaseModel, missing: Mapping[int, Row], prompts: Prompts, writing: Writing
) -> Iterator[tuple[list[Row], Callable[[], bool] | None]]:
    """Rows that are written together, and whether it is too late for them; which they are does not depend on what is kept."""
    most = prompts.batch_size * ROWS_FOR_ONE
    if writing.deadline == math.inf:
        ordered = by_length(base, list(missing.values()), prompts.chat_template)
        yield from ((ordered[start : start + most], None) for start in range(0, len(ordered), most))
        return
    lines = [line for line in dict.fromkeys((*writing.order, *missing)) if line in missing]
    start, size = 0, LEAST
    while start < len(lines):
        late = None if start == 0 else lambda: writing.clock() >= writing.deadline
        yield [missing[line] for line in lines[start : start + size]], late
        start, size = start + size, min(2 * size, most)


def _drawn(rows: Sequence[Row], seed: int) -> list[int]:
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    return [rows[place].line for place in order]


def _kept(path: Path | None, key: str) -> dict[int, str]:
    """Completions by line that were kept for the same key; none where the file is damaged."""
    if path is None or not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        kept = value["completions"] if value["key"] == key else {}
        return {int(line): str(text) for line, text in kept.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _keep(path: Path, key: str, known: Mapping[int, str]) -> None:
    """Of several processes the first one writes."""
    if os.environ.get("RANK", "0") == "0":
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"key": key, "completions": known}))
