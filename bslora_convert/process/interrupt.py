"""Ctrl-C and the end that a system asks for: one line and exit code 130, from the first import on.

Imported before anything that takes time, so it imports next to nothing.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130
UNWRITTEN = "interrupted; nothing was written"
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SEEN = threading.Event()  # an interrupt came


def exit_on_interrupts() -> None:
    """Until a verb runs there is nothing to clean up: an exception would only be printed by whatever is just being imported."""
    _on_interrupts(_exit)


def raise_interrupts() -> None:
    """From here on an interrupt is a KeyboardInterrupt, so that what was begun is cleaned up."""
    SEEN.clear()
    _on_interrupts(raise_interrupt)


@contextmanager
def heeded() -> Iterator[None]:
    """What an import, or a library that was reading a file, made of an interrupt is one again."""
    try:
        yield
    except Exception:
        if SEEN.is_set():
            raise KeyboardInterrupt from None
        raise


def exit_now() -> NoReturn:
    """Ends the process with the exit code of an interrupt, without the interpreter's own clearing away."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # whoever read it is gone
            continue
    os._exit(INTERRUPTED)


def _on_interrupts(handler: "signal._HANDLER") -> None:
    if threading.current_thread() is threading.main_thread():  # handlers are the main thread's to set
        for number in SIGNALS:
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"error: {UNWRITTEN}\n".encode())
    os._exit(INTERRUPTED)


def raise_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Takes a signal for an interrupt, which `heeded` knows of from then on.

    torch, the first that a verb imports, aborts or goes on at an exception in its import: nothing is begun then, so it ends here.
    """
    if getattr(getattr(sys.modules.get("torch"), "__spec__", None), "_initializing", False):
        _exit(number, frame)
    SEEN.set()
    raise KeyboardInterrupt
