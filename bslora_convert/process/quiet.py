"""The libraries underneath keep their words to themselves: a user can act on none of them, and a log has room for results."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

MARK = "BSLORA_CONVERT_LIBRARIES_QUIET"
# The processes that `batch` starts have them from here.
VARIABLES = {
    MARK: "1",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore",
}


def quiet_as_the_parent() -> None:
    """In a process that was started from within `libraries_quiet`: no library logs there either."""
    if MARK in os.environ:
        logging.disable(logging.ERROR)


@contextmanager
def libraries_quiet() -> Iterator[None]:
    """Within it no library logs, warns or draws bars; what a user has set in the environment stays."""
    before = logging.root.manager.disable
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def hushed() -> Iterator[None]:
    """Around a library that prints and draws bars whatever it is told: nothing within `libraries_quiet`, else all on stderr."""
    if logging.root.manager.disable < logging.ERROR:
        with redirect_stdout(sys.stderr):
            yield
        return
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
