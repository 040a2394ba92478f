"""What is handed out, by the content of the compact adapters, each written once and never removed while a server runs.

    CACHE/lora/<digest>/        a PEFT LoRA; the digest is of everything that decides its bytes
    CACHE/compact/<digest>/     or, where workers decode, the compact adapter's own files
    CACHE/.lock                 shared by every living server; whoever gets it alone may tidy up

A path that was handed out is read again at any time, so there is a bound and no eviction: what does not fit is refused. When a
server starts and no other lives, what was not used the longest goes first until half of the bound is free.
"""

import fcntl
import hashlib
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from bslora_convert.errors import InputError, Refused
from bslora_convert.vllm.settings import PLANS

LAYOUT = 1  # of what is written; part of every digest
PARTIAL = ".partial-"


class Snapshots:
    """A cache directory, held for as long as this object lives.

    :raises OSError: when the directory can't be made, or belongs to somebody else.
    """

    def __init__(self, place: Path, most: int, plan: str = PLANS[0]) -> None:
        self.place, self.most = place, most
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if place.stat().st_uid != os.getuid():
            raise PermissionError(f"{place} belongs to another user; give BSLORA_CACHE a place of your own")
        self.held = place / plan
        self.held.mkdir(exist_ok=True)
        self._writing: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self._lock = self._joined()

    @property
    def bytes(self) -> int:
        """Bytes of everything that is held, by whichever server."""
        return sum(size_of(entry) for entry in self.held.iterdir())

    def get(self, digest: str, write: Callable[[Path], None]) -> tuple[Path, bool]:
        """(The directory of a digest, whether it had to be written). write: fills an empty directory.

        :raises Refused: when there is no room for it.
        """
        target = self.held / digest
        with self._guard:
            lock = self._writing.setdefault(digest, threading.Lock())
        with lock:
            if target.is_dir():
                os.utime(target)
                return target, False
            partial = self.held / f"{PARTIAL}{os.getpid()}-{secrets.token_hex(4)}"
            partial.mkdir()
            try:
                write(partial)
                held = self.bytes
                if held > self.most:
                    raise Refused(
                        f"the cache {self.place} holds at most {self.most:,} bytes, and with this adapter it would be {held:,}: "
                        "raise BSLORA_CACHE_GIB and start the server again"
                    )
                try:
                    partial.rename(target)
                except OSError:  # another server was there first
                    if not target.is_dir():
                        raise
                return target, True
            finally:
                shutil.rmtree(partial, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the directory."""
        self._lock.close()

    def _joined(self) -> IO[str]:
        """The lock, shared with other servers; alone, what earlier ones left is tidied up first."""
        lock = (self.place / ".lock").open("a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another server lives
            pass
        else:
            self._tidy()
        fcntl.flock(lock, fcntl.LOCK_SH)
        return lock

    def _tidy(self) -> None:
        """Removes what was begun and never ended, then the oldest entries until half of the bound is free."""
        entries = []
        for entry in self.held.iterdir():
            if entry.name.startswith(PARTIAL):
                shutil.rmtree(entry, ignore_errors=True)
            else:
                entries.append((entry.stat().st_mtime, entry, size_of(entry)))
        held = sum(size for _, _, size in entries)
        for _, entry, size in sorted(entries):
            if held <= self.most // 2:
                break
            shutil.rmtree(entry, ignore_errors=True)
            held -= size


def digest_of(*parts: bytes | str) -> str:
    """SHA-256 of parts, each with its length before it."""
    whole = hashlib.sha256(str(LAYOUT).encode())
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.hexdigest()


def read_small(path: Path, most: int) -> bytes:
    """A regular file's bytes.

    :raises InputError: when it is none, or larger than `most`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror or error})") from None
    if len(data) > most:
        raise InputError(f"{path}: more than {most:,} bytes, no compact adapter")
    return data


def size_of(directory: Path) -> int:
    """Bytes of a directory's files; 0 for one that is not there any more."""
    try:
        return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
    except OSError:
        return 0
