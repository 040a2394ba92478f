"""Results land whole or not at all: written beside the output place, then renamed into it.

    out                       looked at                                  what is there
    .out.partial-HOST-PID     written                                    the result, unfinished
    .out.old-HOST-PID         out, renamed, and compared with the look   what it replaces
    out                       .out.partial-HOST-PID, renamed             the result

Where nothing was there, the last step alone is taken, which fails if there is something now.
"""

import errno
import glob
import os
import platform
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from bslora_convert.errors import InputError, OutputError
from bslora_convert.files.address import MARK
from bslora_convert.files.record import foreign, named

ADAPTER = "adapter_config.json"  # the mark of a directory that is an adapter
HOST = f"{zlib.crc32(platform.node().encode()):08x}"  # numbers of processes are a host's, or a container's, own
Look = Mapping[str, tuple[int, int]]  # (bytes, time of the last change) by path in a directory


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
        if out.resolve().is_mount():
            raise OutputError(f"{out}: a file system is mounted there, so it can't be replaced; give a directory in it")
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

    :raises OutputError: as `check_output`; when writing fails (disk full, permissions); or when `out` was changed meanwhile, and
        then what stands there is kept.
    """
    _put_back(out.resolve())
    check_output(out, overwrite)
    with replacing(out) as place:
        yield place


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """As `landing`, for a directory that is known to be this tool's own: whose it is is not asked.

    :raises OutputError: when writing fails, or another put something there meanwhile.
    """
    target = out.resolve()
    _put_back(target)
    partial = _beside(target, "partial")
    try:
        before = _look(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        yield partial
        _replace(partial, target, before)
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


def copy_files(source: Path, place: Path) -> None:
    """Copies every file of a directory to the same path below `place`: what it holds alone, for a mount may take nothing else.

    :raises OSError: when one can't be copied.
    """
    for path in source.rglob("*"):
        if path.is_file():
            target = place / path.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def _replace(partial: Path, out: Path, before: Look) -> None:
    """Renames `partial` to `out`; what stood there is moved aside, and comes back if it is not what it was or if that fails."""
    changed = OutputError(f"{out}: was changed while this ran; what is there now was kept and nothing was written")
    if not before:
        try:
            if out.exists():
                out.rmdir()
            partial.rename(out)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise changed from None
            raise
        return
    old = _beside(out, "old")
    if not out.exists():
        raise changed
    _move_aside(out, old)
    try:
        if _look(old) != before:
            raise changed
        partial.rename(out)
    except (OSError, OutputError):
        if not out.exists():
            old.rename(out)
            raise
        kept = out.with_name(f"{out.name}.before-{os.getpid()}")
        old.rename(kept)
        raise OutputError(
            f"{out}: was changed while this ran; nothing was written, and what stood there before is {kept}"
        ) from None
    shutil.rmtree(old, ignore_errors=True)


def _look(directory: Path) -> Look:
    """What stands in a directory; nothing where it is not there."""
    if not directory.is_dir():
        return {}
    entries = ((path.relative_to(directory).as_posix(), path.lstat()) for path in directory.rglob("*"))
    return {
        name: (0, 0) if stat.S_ISDIR(found.st_mode) else (found.st_size, found.st_mtime_ns) for name, found in entries
    }


def _move_aside(out: Path, old: Path) -> None:
    """Renames a directory, or, where a file system of layers renames none of a lower one, file by file."""
    try:
        out.rename(old)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        moved = _beside(out, "moved")
        try:
            _move_files(out, moved)
        except OSError:
            _move_files(moved, out)
            raise
        moved.rename(old)


def _move_files(source: Path, place: Path) -> None:
    """Moves every file and folder to the same path below `place`, and removes `source`; what is there already stays in both."""
    place.mkdir(exist_ok=True)
    for path in sorted(source.iterdir()):
        target = place / path.name
        if path.is_dir() and not path.is_symlink():
            _move_files(path, target)
        elif not (target.exists() or target.is_symlink()):
            path.rename(target)
    with suppress(OSError):
        source.rmdir()


def _put_back(out: Path) -> None:
    """Tidies up after runs for the same output that were killed: what they moved comes back, and what they wrote goes."""
    for left in _left_by_the_dead(out, "partial"):
        shutil.rmtree(left, ignore_errors=True)
    for left in _left_by_the_dead(out, "moved"):
        _move_files(left, out)
    for left in _left_by_the_dead(out, "old"):
        if out.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.rename(out)  # killed between the two renames


def _beside(out: Path, what: str) -> Path:
    """What a run of this process for `out` has beside it."""
    return out.parent / f".{out.name}.{what}-{HOST}-{os.getpid()}"


def _left_by_the_dead(out: Path, what: str) -> list[Path]:
    """What runs of this host had beside `out` whose processes are no more."""
    found = [
        (left, left.name.rpartition("-")[2]) for left in out.parent.glob(f".{glob.escape(out.name)}.{what}-{HOST}-*")
    ]
    return [left for left, process in found if process.isdigit() and not _is_alive(int(process))]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
