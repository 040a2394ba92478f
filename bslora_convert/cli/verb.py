"""What every verb does alike: the common options, progress on stderr, one line for an error, the exit code."""

import functools
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from bslora_convert.cli.bars import Lines, bar, each_step
from bslora_convert.cli.screen import console, take_any_path
from bslora_convert.cli.words import unreachable, words
from bslora_convert.errors import BsloraConvertError
from bslora_convert.notes import Note
from bslora_convert.process.interrupt import INTERRUPTED, UNWRITTEN, heeded, raise_interrupts
from bslora_convert.process.progress import Progress, silent
from bslora_convert.process.quiet import libraries_quiet
from bslora_convert.results.record import Record


@dataclass(frozen=True, slots=True)
class Output:
    """Where a verb's words go, by the common options."""

    as_json: bool
    quiet: bool
    verbose: bool

    @contextmanager
    def bar(self, title: str) -> Iterator[Progress]:
        """Shows on stderr where the work is: see `Progress`."""
        say = functools.partial(click.echo, file=sys.stderr)  # this one, whatever a library's is turned to meanwhile
        if self.quiet:
            yield silent
        elif self.verbose:
            yield each_step(title, say)
        elif self.as_json or not sys.stderr.isatty():
            with Lines(title, say).watched() as show:
                yield show
        else:
            with bar(title, console(stderr=True)) as show:
                yield show

    def result(
        self,
        value: Record | Mapping[str, Any],
        show: Callable[[Any], None],
        following: str | None = None,
    ) -> None:
        """The verb's result on stdout: JSON, nothing, or for a reader. following: the command to run next."""
        if self.as_json:
            click.echo(json.dumps(value.to_dict() if isinstance(value, Record) else value, indent=1))
        elif not self.quiet:
            show(console())
            if following is not None:
                click.echo(f"Next: {following}")

    def notes(self, notes: list[str]) -> None:
        """Things worth knowing, on stderr."""
        if not self.quiet:
            for note in map(Note.parse, notes):
                urgent = note.is_urgent
                click.secho(f"note: {note}", err=True, fg="yellow" if urgent else None, dim=None if urgent else True)


def verb(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the common options; the function gets an `Output` first. Errors become one line and an exit code."""

    @click.option("--json", "as_json", is_flag=True, help="Machine-readable result on stdout, nothing else there.")
    @click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
    @click.option("-v", "--verbose", is_flag=True, help="Say each step on stderr.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(function)
    def run(*args: Any, as_json: bool, quiet: bool, verbose: bool, debug: bool, **options: Any) -> None:
        take_any_path()
        raise_interrupts()  # a terminated run cleans up like an interrupted one
        output = Output(as_json, quiet, verbose) if _speaks() else Output(False, True, False)
        try:
            with heeded(), nullcontext() if verbose or debug else libraries_quiet():
                function(output, *args, **options)
        except BsloraConvertError as error:
            if debug:
                raise
            _fail(words(error), error.exit_code)
        except KeyboardInterrupt as stop:
            _fail(str(stop) or UNWRITTEN, INTERRUPTED)
        except MemoryError:
            _fail("out of memory; nothing was written", 1)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except Exception as error:
            if debug:
                raise
            reason = unreachable(error)
            if reason is not None:
                _fail(reason, BsloraConvertError.exit_code)
            _fail(f"internal error ({type(error).__name__}: {error}); run with --debug for the traceback", 1)

    return run


def _speaks() -> bool:
    """Whether this is the first of the processes that `accelerate launch` or torchrun started, or the only one."""
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"


def _fail(message: str, code: int) -> NoReturn:
    click.secho("error: ", err=True, fg="red", nl=False)
    click.echo(message, err=True)
    sys.exit(code)
