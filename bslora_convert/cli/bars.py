"""How far work has come: a bar on a terminal, a line once in a while without one, every step with --verbose."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bslora_convert.process.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID

FIRST, EVERY = 10.0, 30.0  # seconds until the first line, and between lines
LOOKS = 1.0  # seconds between looks at the clock
REMEMBERED = 600.0  # seconds of past steps that the time remaining is told from: a step may take a minute


@dataclass(slots=True)
class Lines:
    """A line once in a while that says where the work is, for a log."""

    title: str
    say: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    began: float = field(init=False)
    due: float = field(init=False)
    at: tuple[str, int, int, str] = ("", 0, 0, "")
    alone: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.began = self.clock()
        self.due = self.began + FIRST

    def __call__(self, phase: str, /, done: int = 0, total: int = 0, words: str = "") -> None:
        """Takes note of where the work is."""
        self.at = phase, done, total, words
        self.look()

    def look(self) -> None:
        """Says where the work is when that is due."""
        with self.alone:
            now = self.clock()
            if now < self.due or not self.at[0]:
                return
            self.due = now + EVERY
        phase, done, total, words = self.at
        count = f" {done}/{total}" if total else ""
        self.say(
            f"{self.title}: " + ", ".join(text for text in (phase + count, words, spent(now - self.began)) if text)
        )

    @contextmanager
    def watched(self) -> Iterator[Progress]:
        """Looks at the clock beside the work, which may be long at one step."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(LOOKS):
                self.look()

        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            ended.set()
            watcher.join()


@contextmanager
def bar(title: str, console: "Console", clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """A bar for each phase, which vanishes with it: count, time spent and time remaining are the phase's."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Shown

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}", markup=False),
    )
    running: dict[str, TaskID] = {}
    with Shown(*columns, console=console, transient=True, get_time=clock, speed_estimate_period=REMEMBERED) as shown:

        def show(phase: str, /, done: int = 0, total: int = 0, words: str = "") -> None:
            count = f"{done}/{total}" if total else ""
            if phase not in running:
                while running:
                    shown.remove_task(running.popitem()[1])
                running[phase] = shown.add_task(f"{title}: {phase}", total=total or None, count=count, words=words)
            shown.update(running[phase], total=total or None, completed=done, count=count, words=words)

        yield show


def each_step(title: str, say: Callable[[str], None]) -> Progress:
    """Every step on a line of its own, once."""
    said = [""]

    def show(phase: str, /, done: int = 0, total: int = 0, words: str = "") -> None:
        step = f"{phase}: {words}" if words else phase
        if step != said[0]:
            said[0] = step
            say(f"{title}: {step}")

    return show


def spent(seconds: float) -> str:
    """`2 min 10 s`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
