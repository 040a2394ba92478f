"""What an interrupted run leaves beside its output: the state after the last evaluation, and completions that were written."""

import shutil
from contextlib import suppress
from pathlib import Path

STATE = "state"  # directory of the checkpoint
COMPLETIONS = "completions-*.json"


def directory_of(out: str | Path) -> Path:
    """`.OUT.training` beside the output."""
    out = Path(out)
    return out.absolute().parent / f".{out.name}.training"


def has_state(out: str | Path) -> bool:
    """Whether there is a state to go on from."""
    return (directory_of(out) / STATE).is_dir()


def has_completions(out: str | Path) -> bool:
    """Whether completions were kept, so that none of them is written again."""
    return any(directory_of(out).glob(COMPLETIONS))


def forget(out: str | Path) -> None:
    """Removes everything that was kept."""
    shutil.rmtree(directory_of(out), ignore_errors=True)


def forget_completions(out: str | Path) -> None:
    """Removes the completions, and nothing that is another run's."""
    directory = directory_of(out)
    for path in directory.glob(COMPLETIONS):
        path.unlink(missing_ok=True)
    with suppress(OSError):  # not there, or not empty
        directory.rmdir()
