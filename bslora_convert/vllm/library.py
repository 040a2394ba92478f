"""Where a library is: a directory here, or a store elsewhere from which a tenant's files come when it is asked for.

    a directory    its files are read where they lie
    a store        configuration, weights and record are fetched into a place of their own, which is gone once they were read

What is handed out to vLLM is a snapshot of either (`snapshots.py`), so a store is needed at a tenant's first sight alone. One
that does not answer is waited for as long as `PATIENCE`, and costs that one request its answer.
"""

import json
import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Protocol

from bslora_convert.bslora.common import is_intact, named_in
from bslora_convert.bslora.storage import CONFIG_NAME, WEIGHTS_NAME
from bslora_convert.errors import BsloraConvertError, InputError
from bslora_convert.files.jsonfile import LARGEST_JSON
from bslora_convert.files.record import FIDELITY_NAME
from bslora_convert.files.store import Store, is_url
from bslora_convert.vllm.names import being_replaced, find, is_given_out

LARGEST_WEIGHTS = 2 << 30
LARGEST = {CONFIG_NAME: LARGEST_JSON, WEIGHTS_NAME: LARGEST_WEIGHTS, FIDELITY_NAME: LARGEST_JSON}  # files, with bytes
PATIENCE = 60.0  # seconds


class Away(InputError):
    """What a store has of a tenant can't be had, or not in time."""


class Library(Protocol):
    """What the plugin asks of a library."""

    def tenant(self, name: str) -> AbstractContextManager[Path | None]:
        """The directory of a tenant's files, for as long as the block lasts; None for a name that the library does not have."""

    def being_replaced(self, name: str) -> bool:
        """Whether it is worth asking for a tenant again in a moment."""


def opened(library: str | Path) -> Library:
    """The library of a directory or of a URL."""
    return Elsewhere(str(library)) if not Path(library).is_dir() and is_url(library) else Here(Path(library))


class Here:
    """A directory."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @contextmanager
    def tenant(self, name: str) -> Iterator[Path | None]:
        """As `Library`."""
        yield find(self.place, name)

    def being_replaced(self, name: str) -> bool:
        """As `Library`: a result is about to take the tenant's place."""
        return being_replaced(self.place, name)


class Elsewhere:
    """A store. patience: the seconds that one tenant's files may take."""

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        self.url, self.patience = url, patience
        self._room = TemporaryDirectory(prefix="bslora-")

    @contextmanager
    def tenant(self, name: str) -> Iterator[Path | None]:
        """As `Library`; `Away` is raised when the files can't be had."""
        if not is_given_out(name):
            yield None
            return
        with TemporaryDirectory(dir=self._room.name, ignore_cleanup_errors=True) as place:
            yield self._in_time(name, Path(place))

    def being_replaced(self, name: str) -> bool:
        """As `Library`: a store does not tell."""
        return False

    def _in_time(self, name: str, place: Path) -> Path | None:
        said: SimpleQueue[Path | BaseException | None] = SimpleQueue()

        def fetch() -> None:
            try:
                said.put(self._fetch(name, place))
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
