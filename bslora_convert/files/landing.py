"""Results land whole or not at all: written beside the output place, then renamed into it."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bslora_convert.errors import InputError, OutputError
from bslora_convert.files.address import MARK
from bslora_convert.files.record import foreign, named

ADAPTER = "adapter_config.json"  # the mark of a directory that is an adapter


def check_outside(out: Path) -> None:
    """Refuses a place that is another's: an address in a library, or anything inside of an adapter.

    :raises OutputError: naming it.
    """
    if MARK in str(out):
        raise OutputError(f"{out}: {MARK} names an adapter of a library, which `batch` alone writes; give a directory")
    inside = next((above for above in out.resolve().parents if (above / ADAPTER).is_file()), None)
    if inside is not None:
        raise OutputError(
            f"{out}: lies inside of the adapter {inside}, for a part of which it would be taken; give another place"
        )


def check_output(out: Path, overwrite: bool, *sources: Path) -> None:
    """Refuses an output place that can't be used, before any work is done. sources: what it must stay apart from.

    :raises InputError: as `check_apart`.
    :raises OutputError: when it is a file, a directory with content without `overwrite`, with `overwrite` one in which anything
        was not written by this tool or was changed since, one that holds the current directory or the user's own, an address
        in a library or a place inside of an adapter, or can't be made.
    """
    for source in sources:
        check_apart(source, out)
    check_outside(out)
    if any(out.resolve() in (place, *place.parents) for place in (Path.cwd(), Path.home())):
        raise OutputError(f"{out}: holds the current directory or your own; it is not replaced")
    if out.exists():
        if not out.is_dir():
            raise OutputError(f"{out}: exists and is not a directory")
        _check_content(out, overwrite)
    ancestor = out.resolve().parent
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise OutputError(f"{out}: {ancestor} can't be written to")


def _check_content(out: Path, overwrite: bool) -> None:
    try:
        if not any(out.iterdir()):
            return
        if not overwrite:
            raise OutputError(f"{out}: not empty; give --overwrite to replace what this tool wrote there")
        strangers = foreign(out)
    except OSError as error:
        raise OutputError(f"{out}: can't be looked into ({error.strerror or error})") from None
    if strangers:
        raise OutputError(
            f"{out}: --overwrite replaces only what this tool wrote, and there is also {named(strangers)}; "
            "nothing was touched: move that away or give another directory"
        )


def check_apart(source: Path, out: Path) -> None:
    """Refuses an output place in the source directory, or one that holds it.

    source: a directory, or a file in it.

    :raises InputError: naming both.
    """
    given, target = source.resolve(), out.resolve()
    place = given.parent if given.is_file() else given
    if target == place or target in place.parents:
        raise InputError(f"{out}: the output would replace the source {source}; give a directory outside of it")
    if place in target.parents:
        raise InputError(f"{out}: the output would lie inside of the source {source}; give a directory outside of it")


@contextmanager
def landing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A fresh directory beside `out` that takes its place when the block ends well and vanishes when it doesn't.

    A link to a directory stays; the directory that it means is replaced.

    :raises OutputError: as `check_output`, or when writing fails (disk full, permissions).
    """
    _remove_stale(out.resolve())
    check_output(out, overwrite)
    with replacing(out) as place:
        yield place


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """As `landing`, for a directory that is known to be this tool's own: what stands there is not looked at.

    :raises OutputError: when writing fails.
    """
    target = out.resolve()
    _remove_stale(target)
    partial = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _replace(partial, target)
    except OSError as error:
        raise OutputError(f"{out}: can't be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes a file, of text or bytes, beside and renames it into place.

    :raises OutputError: when it can't be written.
    """
    partial = path.with_name(
        f".{path.name}.partial-{os.getpid()}-{secrets.token_hex(4)}"
    )  # other hosts have this number too
    try:
        partial.write_bytes(content if isinstance(content, bytes) else content.encode())
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: can't be written ({error.strerror or error})") from error
    finally:  # an interrupt leaves nothing either
        partial.unlink(missing_ok=True)


def _replace(partial: Path, out: Path) -> None:
    """Renames `partial` to `out`; what stood there is moved aside first and comes back if that fails."""
    old = out.parent / f".{out.name}.old-{os.getpid()}"
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        if old.exists():
            old.rename(out)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(out: Path) -> None:
    """Removes what killed runs for the same output left behind."""
    for left in out.parent.glob(f".{out.name}.partial-*"):
        process = left.name.rpartition("-")[2]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(left, ignore_errors=True)
    for left in out.parent.glob(f".{out.name}.old-*"):
        process = left.name.rpartition("-")[2]
        if process.isdigit() and not _is_alive(int(process)):
            if out.exists():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.rename(out)  # killed between the two renames: what stood there comes back


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
