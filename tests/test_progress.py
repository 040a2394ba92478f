"""Progress: a bar for each phase that is not begun anew with each word, and a line once in a while for a log."""

import io
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

from bslora_convert import Recipe, compress
from bslora_convert.cli import bars, main
from bslora_convert.cli.bars import EVERY, FIRST, Lines, bar, spent
from tests.planting import random_products, write_lora


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_after_ten_seconds_and_then_one_every_thirty() -> None:
    said: list[str] = []
    clock = Clock()
    lines = Lines("batch", said.append, clock)
    for second in range(200):
        clock.now = float(second)
        lines("converting", second // 5, 40)
    assert len(said) == 1 + (199 - FIRST) // EVERY
    assert said[0] == "batch: converting 2/40, 10 s"
    assert said[4] == "batch: converting 26/40, 2 min 10 s"
    clock.now = 4000.0
    lines("training", 3, words="loss 0.1")
    assert said[-1] == "batch: training, loss 0.1, 1 h 6 min"


def test_a_long_step_is_spoken_of_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "LOOKS", 0.01)
    monkeypatch.setattr(bars, "FIRST", 0.0)
    import threading

    heard = threading.Event()
    with Lines(
        "compress", lambda line: heard.set() if line.startswith("compress: fitting") else None
    ).watched() as show:
        monkeypatch.setattr(bars, "EVERY", 0.0)
        show("fitting", 0, 0)
        heard.clear()
        assert heard.wait(10)  # without another call


def shown_last(screen: io.StringIO) -> str:
    """The last state of the bar, without colours."""
    return [line for line in re.sub(r"\x1b\[[0-9;?]*\w", "", screen.getvalue()).splitlines() if line.strip()][-1]


def test_words_change_and_the_bar_goes_on() -> None:
    clock = Clock()
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=150, get_time=clock)
    with bar("finetune", console, clock) as show:
        for step in range(1, 6):
            clock.now = 30.0 * step
            show("training", step, 11, f"loss {1 / step:.2f} [red]/x")
    last = shown_last(screen)
    assert "finetune: training" in last
    assert "5/11" in last
    assert "loss 0.20 [red]/x" in last
    assert "0:03:00" in last  # six more of thirty seconds: the rate is that of all steps


def test_phases_have_bars_of_their_own() -> None:
    screen = io.StringIO()
    with bar("compress", Console(file=screen, force_terminal=True, width=150)) as show:
        show("reading", 0, 0)
        show("coding ke", 1, 4)
    assert "0/?" not in screen.getvalue()
    assert "compress: coding ke" in shown_last(screen)


@pytest.mark.parametrize("options", [{"bytes": 0.25}, {"bits": 4, "budget": 0.5}, {"max_error": 0.3, "bits": 3}])
def test_coding_counts_what_it_codes(tmp_path: Path, options: dict[str, float]) -> None:
    lora = write_lora(tmp_path / "lora", random_products(rank=8))
    phases: dict[str, list[tuple[int, int]]] = {}

    def listen(phase: str, /, done: int = 0, total: int = 0, words: str = "") -> None:
        phases.setdefault(phase, []).append((done, total))

    recipe = Recipe(transform="ke", shared_size=32, **options)  # type: ignore[arg-type]
    compress(lora, tmp_path / "out", recipe, progress=listen, report_html=False)
    coding = {phase: counts for phase, counts in phases.items() if phase.startswith("coding ke")}
    assert coding
    for counts in coding.values():
        total = counts[-1][1]
        assert counts == [(done, total) for done in range(1, total + 1)]


def test_a_log_gets_lines_and_stdout_only_the_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bars, "FIRST", 0.0)
    monkeypatch.setattr(bars, "EVERY", 0.0)
    library = tmp_path / "library"
    for name in "abc":
        write_lora(library / name, random_products(layers=1))
    words = ["batch", str(library), "OUT", "--workers", "0", "--transform", "none", "--no-report-html"]

    def run(name: str, *more: str) -> tuple[str, str]:
        done = CliRunner().invoke(main, [str(tmp_path / name) if word == "OUT" else word for word in (*words, *more)])
        assert done.exit_code == 0, done.stderr
        return done.stdout, done.stderr

    assert re.search(r"^batch: converting 2/3, \w+ ok, \d s$", run("a")[1], re.MULTILINE)
    stdout, stderr = run("b", "--json")
    assert stdout.startswith("{")
    assert "converting" in stderr
    assert run("c", "--quiet") == ("", "")


def test_time_is_said_in_words() -> None:
    assert [spent(seconds) for seconds in (0, 59.9, 60, 130, 3600, 9000)] == [
        "0 s", "59 s", "1 min 0 s", "2 min 10 s", "1 h 0 min", "2 h 30 min"
    ]  # fmt: skip
