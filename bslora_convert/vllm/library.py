"""Where a library is: a directory here, or a store elsewhere from which a tenant's files come when it is asked for.

    a directory    its files are read where they lie
    a store        configuration, weights and record are fetched into a place of their own, which is gone once they were read

Who is a tenant the library's manifest says, where it has one (`is_tenant`). What is handed out to vLLM is a snapshot of either
(`snapshots.py`), so a store is needed at a tenant's first sight alone. One that does not answer is waited for as long as
`PATIENCE`, and costs that one request its answer.
"""

import json
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any, Protocol

from bslora_convert.bslora.common import is_intact, named_in
from bslora_convert.bslora.storage import CONFIG_NAME, WEIGHTS_NAME
from bslora_convert.errors import BsloraConvertError, InputError, Refused
from bslora_convert.files.address import MANIFEST
from bslora_convert.files.jsonfile import LARGEST_JSON
from bslora_convert.files.record import FIDELITY_NAME
from bslora_convert.files.store import Store, is_url
from bslora_convert.library.manifest import DONE, read_manifest
from bslora_convert.vllm.names import being_replaced, find, is_given_out

LARGEST_WEIGHTS = 2 << 30
LARGEST = {CONFIG_NAME: LARGEST_JSON, WEIGHTS_NAME: LARGEST_WEIGHTS, FIDELITY_NAME: LARGEST_JSON}  # files, with bytes
PATIENCE = 60.0  # seconds
FRESH = 10.0  # seconds that a store's manifest is taken for what it was
Row = Mapping[str, Any]


class Away(InputError):
    """What a store has of a tenant can't be had, or not in time."""


class Library(Protocol):
    """What the plugin asks of a library."""

    def tenant(self, name: str) -> AbstractContextManager[Path | None]:
        """The directory of a tenant's files, for as long as the block lasts; None for a name that the library does not have."""

    def rows(self) -> Mapping[str, Row] | None:
        """The manifest's rows by id; None where the library has no manifest."""

    def being_replaced(self, name: str) -> bool:
        """Whether it is worth asking for a tenant again in a moment."""


def opened(library: str | Path) -> Library:
    """The library of a directory or of a URL."""
    return Elsewhere(str(library)) if not Path(library).is_dir() and is_url(library) else Here(Path(library))


class Here:
    """A directory."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._read: tuple[object, dict[str, Row] | None] = (None, None)  # the manifest's look, and its rows

    @contextmanager
    def tenant(self, name: str) -> Iterator[Path | None]:
        """As `Library`."""
        found = find(self.place, name)
        yield found if found is not None and is_tenant(self.rows(), name) else None

    def rows(self) -> dict[str, Row] | None:
        """The manifest's rows by id, read again whenever it is another file; None where there is none.

        :raises InputError: when it is damaged.
        """
        try:
            seen = (self.place / MANIFEST).stat()
        except FileNotFoundError:
            return None
        look = (seen.st_ino, seen.st_mtime_ns, seen.st_size)
        if self._read[0] != look:
            self._read = look, {row["id"]: row for row in read_manifest(self.place)}
        return self._read[1]

    def being_replaced(self, name: str) -> bool:
        """As `Library`: a result is about to take the tenant's place."""
        return being_replaced(self.place, name)


class Elsewhere:
    """A store. patience: the seconds that one tenant's files may take."""

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.url, self.patience = url, patience
        self._room = TemporaryDirectory(prefix="bslora-")
        self._read: tuple[float, dict[str, Row] | None] = (-math.inf, None)  # when, and the manifest's rows

    @contextmanager
    def tenant(self, name: str) -> Iterator[Path | None]:
        """As `Library`; `Away` is raised when the files can't be had."""
        if not is_given_out(name):
            yield None
            return
        with TemporaryDirectory(dir=self._room.name, ignore_cleanup_errors=True) as place:
            yield self._in_time(lambda: self._fetch(name, Path(place)))

    def rows(self) -> dict[str, Row] | None:
        """As of `Here`; what was read is taken for `FRESH` seconds.

        :raises Away: when it can't be had.
        """
        rows: dict[str, Row] | None = self._in_time(self._rows)
        return rows

    def _rows(self) -> dict[str, Row] | None:
        now = time.monotonic()
        if now - self._read[0] > FRESH:
            there = Store.at(self.url).bytes_of(MANIFEST) is not None
            self._read = now, {row["id"]: row for row in read_manifest(self.url)} if there else None
        return self._read[1]

    def being_replaced(self, name: str) -> bool:
        """As `Library`: a store does not tell."""
        return False

    def _in_time(self, ask: Callable[[], Any]) -> Any:
        said: SimpleQueue[Any] = SimpleQueue()

        def fetch() -> None:
            try:
                said.put(ask())
            except BaseException as error:  # is raised where it is waited for
                said.put(error)

        Thread(target=fetch, daemon=True).start()  # a server that ends does not wait for it
        try:
            found = said.get(timeout=self.patience)
        except Empty:
            raise Away(f"{self.url}: nothing came within {self.patience:g} s") from None
        if isinstance(found, BsloraConvertError):
            raise Away(str(found)) from None
        if isinstance(found, BaseException):
            raise found
        return found

    def _fetch(self, name: str, place: Path) -> Path | None:
        if not is_tenant(self._rows(), name):
            return None
        store = Store.at(self.url)
        held = [file for file in LARGEST if _fits(store, f"{name}/{file}", LARGEST[file])]
        if CONFIG_NAME not in held:
            return None
        store.copy([f"{name}/{file}" for file in held], place)
        common = _named(place / name / CONFIG_NAME)
        kept = Path(self._room.name)  # above the place of every tenant
        if common is not None and not is_intact(kept / common) and _fits(store, common, LARGEST_WEIGHTS):
            partial = kept / f"partial-{secrets.token_hex(4)}"
            store.copy([common], partial)
            (partial / common).replace(kept / common)
        return place / name


def is_tenant(rows: Mapping[str, Row] | None, name: str) -> bool:
    """Whether a library's manifest has a tenant of this name; without a manifest what the library holds is one.

    :raises Refused: when its last conversion did not end well.
    """
    if rows is None or name not in rows:
        return rows is None
    row = rows[name]
    if row.get("status") not in DONE:
        raise Refused(f"its last conversion {row.get('status')}: {row.get('message')}")
    return True


def _named(config: Path) -> str | None:
    """The file of a library that a tenant's configuration names; a damaged one names none, and is refused later."""
    try:
        return named_in(json.loads(config.read_bytes()))
    except (ValueError, RecursionError):
        return None


def _fits(store: Store, file: str, most: int) -> bool:
    """Whether a store holds a file.

    :raises InputError: when it is larger than any of a compact adapter.
    """
    size = store.bytes_of(file)
    if size is not None and size > most:
        raise InputError(f"{store.url}/{file}: {size:,} bytes, more than {most:,}; no compact adapter")
    return size is not None
