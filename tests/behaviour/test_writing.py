"""Completions that the reference writes: within the time, in the order of need, kept as they are written, the same as without."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from bslora_convert import Recipe, Training, compress, finetune
from bslora_convert.behaviour import writing
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.training_rows import split_heldout
from bslora_convert.behaviour.writing import ENOUGH, SHARE, Writing, deadline_of, order_of_need
from bslora_convert.cli import main
from bslora_convert.errors import RecipeError
from tests.behaviour.conftest import BASE, LORA, PROMPTS
from tests.recipes import by_file

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("writing") / "none"
    compress(LORA, out, Recipe(transform="none", budget=0.2), report_html=False)
    return out


@pytest.fixture(scope="module")
def unanswered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty prompts without completions."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    rows = [{"prompt": json.loads(line)["prompt"]} for line in PROMPTS.read_text().splitlines()[:40]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Clock:
    """Seconds that pass with each look."""

    def __init__(self, a_look: float) -> None:
        self.now, self.a_look = 0.0, a_look

    def __call__(self) -> float:
        self.now += self.a_look
        return self.now


def split(rows: Prompts) -> tuple[list[int], list[int], tuple[int, ...]]:
    train, held = split_heldout(rows.rows, Training())
    return [row.line for row in train], [row.line for row in held], order_of_need(train, held, 0)


def test_held_out_rows_come_first_and_all_rows_come_once(unanswered: Path) -> None:
    train, held, order = split(Prompts.read(unanswered))
    assert sorted(order) == sorted([*train, *held])
    assert order[0] in held
    assert order[1] in train
    assert set(order[: 1 + min(ENOUGH, len(held))]) >= set(held)
    rows = Prompts.read(PROMPTS).rows
    many = order_of_need(rows[:40], rows[40:], 3)  # 24 held out: eight at once, the others spread among the rest
    kinds = [line > rows[39].line for line in many]
    assert sum(kinds[:9]) == ENOUGH
    assert 6 <= sum(kinds[9:36]) <= 10


def test_writing_takes_its_share_of_the_time_that_is_left() -> None:
    assert deadline_of(0.0, None) == math.inf
    assert deadline_of(100.0, 10, lambda: 400.0) == pytest.approx(400 + SHARE * 300)
    assert deadline_of(0.0, 1, lambda: 400.0) == 400.0


def test_a_slow_reference_writes_what_is_needed_first_and_the_rest_is_left_out(
    session: BaseModelSession, unanswered: Path
) -> None:
    rows = Prompts.read(unanswered, max_new_tokens=4)
    _, _, order = split(rows)
    clock = Clock(1.0)  # a second with each look, of which there is one a token
    found = session.encode(rows, Writing(deadline=13.0, order=order, clock=clock))
    assert 6 < len(found.rows) < 40
    assert {row.line for row in found.rows} == set(order[: len(found.rows)])
    assert (found.written, found.left_out) == (len(found.rows), 40 - len(found.rows))
    assert (
        f"for {found.written} of them in the time there was; the other {found.left_out} are left out" in found.notes[0]
    )
    assert clock.now <= 13 + 4  # no row is begun, none goes on, after the deadline
    late = session.encode(rows, Writing(deadline=-1.0, order=order, clock=clock))
    assert {row.line for row in late.rows} == set(order[:2])  # one to train on, one held out


def test_a_text_that_had_no_time_to_end_is_not_taken_for_a_whole_one(
    session: BaseModelSession, unanswered: Path
) -> None:
    rows = Prompts.read(unanswered, limit=8, max_new_tokens=12)
    whole = {row.line: row.completion for row in session.encode(rows).rows}
    cut = session.encode(rows, Writing(deadline=4.0, clock=Clock(1.0))).rows
    assert 2 <= len(cut) < 8
    assert all(row.completion == whole[row.line] for row in cut)


def interrupted_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The reference is interrupted when it has written some batches; the function lets it go on."""
    real, begun = writing.write, []

    def write(*arguments: object, **options: object) -> list[str | None]:
        begun.append(1)
        if len(begun) > batches:
            raise KeyboardInterrupt
        return real(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(writing, "write", write)
    return lambda: monkeypatch.setattr(writing, "write", real)


def finetuning(compact: Path, prompts: Path, out: Path, *more: str) -> list[str]:
    return [
        "finetune", str(compact), str(out), "--reference", str(LORA), "--base-model", str(BASE), "--prompts", str(prompts),
        "--max-steps", "2", *by_file(out.parent / "recipe.toml", batch_size=4, max_new_tokens=4), "--json", *more,
    ]  # fmt: skip


def test_an_interrupt_keeps_what_was_written_and_the_same_command_uses_it(
    compact: Path, unanswered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = CliRunner().invoke(main, finetuning(compact, unanswered, tmp_path / "whole"))
    assert whole.exit_code == 0, whole.stderr
    out = tmp_path / "out"
    for resume in ((), ("--resume",)):
        go_on = interrupted_after(1, monkeypatch)
        stopped = CliRunner().invoke(main, finetuning(compact, unanswered, out, *resume))
        assert stopped.exit_code == 130
        assert "completions that were written are kept" in stopped.stderr
        assert not out.exists()
        go_on()
    (kept,) = (tmp_path / ".out.training").iterdir()
    assert len(json.loads(kept.read_text())["completions"]) == 32  # two batches of sixteen
    written: list[int] = []
    real = writing.write
    monkeypatch.setattr(
        writing, "write", lambda base, rows, *rest: written.append(len(rows)) or real(base, rows, *rest)
    )
    done = CliRunner().invoke(main, finetuning(compact, unanswered, out))
    assert done.exit_code == 0, done.stderr
    assert written == [8]
    assert (out / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert not (tmp_path / ".out.training").exists()


def test_time_ends_the_writing_and_the_record_says_of_how_many_rows(
    compact: Path, unanswered: Path, tmp_path: Path
) -> None:
    training = Training(max_minutes=1e-6, batch_size=4, max_new_tokens=4)
    record = finetune(compact, tmp_path / "out", LORA, str(BASE), unanswered, training)
    assert record["training"]["completions"] == {"written": 2, "left_out": 38}
    assert (record["training"]["training_rows"], record["training"]["heldout_rows"]) == (1, 1)
    assert any("2 of them in the time there was; the other 38 are left out" in note for note in record["notes"])
    recipe = Recipe(transform="none", budget=0.2, base_model=str(BASE), finetune=str(unanswered))
    compressed = compress(LORA, tmp_path / "compressed", recipe, training=replace_rows(training), report_html=False)
    assert compressed["training"]["completions"]["left_out"] == 38
    assert not list(tmp_path.glob(".*"))


def replace_rows(training: Training) -> Training:
    return Training(max_minutes=training.max_minutes, batch_size=training.batch_size)


def test_time_enough_gives_every_row(compact: Path, unanswered: Path, tmp_path: Path) -> None:
    training = Training(max_steps=2, max_minutes=60, batch_size=4, max_new_tokens=4)
    record = finetune(compact, tmp_path / "out", LORA, str(BASE), unanswered, training)
    assert record["training"]["completions"] == {"written": 40, "left_out": 0}


def test_compress_keeps_completions_too(unanswered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted_after(1, monkeypatch)
    words = [
        "compress", str(LORA), str(tmp_path / "out"), "--transform", "none", "--budget", "0.2", "--base-model", str(BASE),
        "--finetune", str(unanswered), *by_file(tmp_path / "recipe.toml", batch_size=2),
    ]  # fmt: skip
    stopped = CliRunner().invoke(main, words)
    assert stopped.exit_code == 130
    assert "the same command goes on" in stopped.stderr
    (kept,) = (tmp_path / ".out.training").iterdir()
    assert len(json.loads(kept.read_text())["completions"]) == 8


def test_held_out_rows_are_not_trained_on_unsaid(compact: Path, tmp_path: Path) -> None:
    lines = PROMPTS.read_text().splitlines(keepends=True)
    files = {"train": lines[:20], "copy": lines[:20], "part": lines[16:24]}
    for name, part in files.items():
        (tmp_path / name).write_text("".join(part))
    for name in ("train", "copy"):
        refused = CliRunner().invoke(
            main, finetuning(compact, tmp_path / "train", tmp_path / "out", "--heldout", str(tmp_path / name))
        )
        assert refused.exit_code == 2
        assert f"--heldout is {tmp_path / name}: all of its 20 rows" in refused.stderr
    done = finetune(
        compact, tmp_path / "out", LORA, str(BASE), tmp_path / "train", Training(max_steps=1), heldout=tmp_path / "part"
    )
    assert "4 of the 8 held-out rows are trained on as well" in done["notes"]


def test_there_must_be_something_to_resume(compact: Path, tmp_path: Path) -> None:
    refused = CliRunner().invoke(main, finetuning(compact, PROMPTS, tmp_path / "out", "--resume"))
    assert refused.exit_code == 2
    assert "--resume: there is nothing to go on from" in refused.stderr
    with pytest.raises(RecipeError, match=r"^resume: there is nothing"):
        finetune(compact, tmp_path / "out", LORA, str(BASE), PROMPTS, resume=True)
