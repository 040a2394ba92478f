"""An item's files on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from bslora_convert.errors import InputError
from bslora_convert.files.store import HUB, Store
from bslora_convert.files.travel import travels
from bslora_convert.library.items import Item
from bslora_convert.lora.adapter import CONFIG_NAME, WEIGHTS_NAMES


@contextmanager
def local_copy(item: Item) -> Iterator[Path]:
    """The adapter's directory; a remote one's configuration, weights and what travels are fetched and gone afterwards.

    :raises InputError: when it can't be read.
    """
    if not item.is_remote:
        yield Path(item.uri)
        return
    store = Store.at(at_revision(item))
    with TemporaryDirectory(prefix="bslora-") as place:
        try:
            names = store.names(depth=2)
            kept = {CONFIG_NAME, *next(([name] for name in WEIGHTS_NAMES if name in names), [])}
            store.copy([name for name in names if name in kept or travels(name)], Path(place))
        except InputError as error:
            raise InputError(f"{item.id}: {error}") from None
        yield Path(place)


def at_revision(item: Item) -> str:
    """The URL at its revision, `hf://org/repo@revision/sub`; other file systems have none.

    :raises InputError: for those.
    """
    if item.revision is None:
        return item.uri
    scheme, _, path = item.uri.partition("://")
    parts = path.split("/")
    if scheme != HUB or len(parts) < 2 or "@" in parts[1]:
        raise InputError(f"{item.id}: a revision is for hf://org/repo URLs without one, not for {scheme}://")
    return f"{scheme}://{parts[0]}/{parts[1]}@{item.revision}" + "".join(f"/{part}" for part in parts[2:])
