"""What every verb does alike: the common options, progress on stderr, one line for an error, the exit code."""

import functools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from bslora_convert.errors import BsloraConvertError

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Output:
    """Where a verb's words go, by the common options."""

    as_json: bool
    quiet: bool
    verbose: bool

    @contextmanager
    def progress(self, title: str) -> Iterator[Callable[[str], None]]:
        """A line on a terminal's stderr that says what is being done; with --verbose, each step on a line of its own."""
        from rich.console import Console

        console = Console(stderr=True)
        if self.verbose:
            yield lambda step: console.print(f"{title}: {step}", style="dim", highlight=False, markup=False)
        elif self.quiet or self.as_json or not console.is_terminal:
            yield lambda step: None
        else:
            from rich.markup import escape

            with console.status(title) as status:
                yield lambda step: status.update(f"{title}: {escape(step)}")

    @contextmanager
    def bar(self, title: str) -> Iterator[Callable[[str, int, int], None]]:
        """As `progress`, for work that counts: called with a step, how much of it is done and how much there is (0 = unknown)."""
        from rich.console import Console

        console = Console(stderr=True)
        if self.verbose or self.quiet or self.as_json or not console.is_terminal:
            with self.progress(title) as say:
                steps: list[str] = []

                def once(step: str, done: int, total: int) -> None:
                    if step not in steps[-1:]:
                        steps.append(step)
                        say(step)

                yield once
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as shown:
            task = shown.add_task(title, total=None)

            def show(step: str, done: int, total: int) -> None:
                description = f"{title}: {step}"
                if description != shown.tasks[0].description:
                    shown.reset(task, total=total or None, description=description)
                shown.update(task, completed=done)

            yield show

    def result(self, value: Any, show: Callable[[Any], None]) -> None:
        """The verb's result on stdout: JSON, nothing, or for a reader."""
        if self.as_json:
            click.echo(json.dumps(value, indent=1))
        elif not self.quiet:
            from rich.console import Console

            show(Console())

    def notes(self, notes: list[str]) -> None:
        """Things worth knowing, on stderr."""
        if not self.quiet:
            for note in notes:
                click.secho(f"note: {note}", err=True, dim=True)


accept_changed_option = click.option(
    "--accept-changed",
    is_flag=True,
    help="Take weights that are not what was written and measured any more (re-saved, damaged).",
)


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the common options; the function gets an `Output` first. Errors become one line and an exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout, nothing else there.")
    @click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
    @click.option("-v", "--verbose", is_flag=True, help="Say each step on stderr.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def run(*args: Any, as_json: bool, quiet: bool, verbose: bool, debug: bool, **options: Any) -> None:
        if quiet or as_json or not sys.stderr.isatty():
            os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries, as our own, are for terminals
        signal.signal(signal.SIGTERM, _interrupt)  # so that a terminated run cleans up like an interrupted one
        output = Output(as_json, quiet, verbose) if _speaks() else Output(False, True, False)
        try:
            function(output, *args, **options)
        except BsloraConvertError as error:
            if debug:
                raise
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt as stop:
            _fail(str(stop) or "interrupted; nothing was written", INTERRUPTED)
        except MemoryError:
            _fail("out of memory; nothing was written", 1)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:
            if debug:
                raise
            _fail(f"internal error ({type(error).__name__}: {error}); run with --debug for the traceback", 1)

    return run


def _speaks() -> bool:
    """Whether this is the first of the processes that `accelerate launch` or torchrun started, or the only one."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    click.secho("error: ", err=True, fg="red", nl=False)
    click.echo(message, err=True)
    sys.exit(code)
