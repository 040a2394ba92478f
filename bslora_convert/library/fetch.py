"""An item's files on this machine."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from bslora_convert.errors import InputError, reason_of
from bslora_convert.files.travel import travels
from bslora_convert.library.discovery import open_url
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
    filesystem, root, _ = open_url(at_revision(item))
    with TemporaryDirectory(prefix="bslora-") as place:
        try:
            top = PurePosixPath(root)
            found = [PurePosixPath(name) for name in filesystem.find(root, maxdepth=2)]
            names = {name.relative_to(top).as_posix(): name for name in found if name.is_relative_to(top)}
            wanted = {CONFIG_NAME, *next(([name] for name in WEIGHTS_NAMES if name in names), [])}
            for name, remote in names.items():
                if name in wanted or (travels(name) and ".." not in remote.parts):
                    (Path(place) / name).parent.mkdir(exist_ok=True)
                    filesystem.get_file(str(remote), str(Path(place) / name))
        except Exception as error:  # what a remote file system raises has no common base
            raise InputError(f"{item.id}: can't be fetched ({reason_of(error)})") from None
        yield Path(place)


def at_revision(item: Item) -> str:
    """The URL at its revision, `hf://org/repo@revision/sub`; other file systems have none.

    :raises InputError: for those.
    """
    if item.revision is None:
        return item.uri
    scheme, _, path = item.uri.partition("://")
    parts = path.split("/")
    if scheme != "hf" or len(parts) < 2 or "@" in parts[1]:
        raise InputError(f"{item.id}: a revision is for hf://org/repo URLs without one, not for {scheme}://")
    return f"{scheme}://{parts[0]}/{parts[1]}@{item.revision}" + "".join(f"/{part}" for part in parts[2:])
