"""A directory of a store elsewhere, by any fsspec URL (`hf://` among them): what it holds, and copies of that on this machine.

All that is read from a store comes through here. Credentials come from the environment (`HF_TOKEN`, `AWS_*`, …); a URL that holds
some is refused, for records hold URLs. A listing is a stranger's: a name that leads out is refused before anything is fetched.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from bslora_convert.errors import InputError, RecipeError, reason_of

# One slash is what is left of two once a URL has been taken for a path.
URL = re.compile(r"(?P<scheme>[a-z][a-z0-9+]+):/+(?P<rest>[^/].*)")
HUB = "hf"


def is_url(address: object) -> bool:
    """Whether an address names a place elsewhere."""
    return URL.fullmatch(str(address)) is not None


def as_written(address: object) -> str:
    """An address as records name it: a URL with both of its slashes, whatever became of them, and anything else as it is."""
    match = URL.fullmatch(str(address))
    return f"{match['scheme']}://{match['rest']}" if match else str(address)


def parts_of(address: object) -> tuple[str, str]:
    """(Scheme, what follows it) of a URL, which holds nothing that records must not.

    :raises InputError: when it is none, holds credentials, or leads up.
    """
    match = URL.fullmatch(str(address))
    if match is None:
        raise InputError(f"{address}: no URL")
    scheme, rest = match["scheme"], match["rest"].rstrip("/")
    if "?" in rest or (scheme != HUB and "@" in rest.split("/")[0]):
        raise InputError(
            f"{scheme}://…: credentials belong in the environment, not in a URL that is written into records"
        )
    if ".." in PurePosixPath(rest).parts:
        raise InputError(f"{scheme}://{rest}: an address without .. is expected")
    return scheme, rest


@dataclass(frozen=True, slots=True)
class Store:
    """url: as messages name it. filesystem, root: fsspec's, and the directory in it."""

    url: str
    filesystem: Any
    root: str

    @classmethod
    def at(cls, url: str) -> "Store":
        """The directory of a URL; nothing is asked of the store yet. File systems are a thread's own.

        :raises RecipeError: when the package for its scheme is missing. :raises InputError: when the URL is not one.
        """
        scheme, rest = parts_of(url)
        import fsspec

        endpoint = os.environ.get("HF_ENDPOINT") if scheme == HUB else None
        try:
            filesystem, root = fsspec.core.url_to_fs(
                f"{scheme}://{rest}", **({"endpoint": endpoint} if endpoint else {})
            )
        except ImportError as error:
            raise RecipeError(f"{scheme}:// needs another package ({reason_of(error)})") from None
        except (OSError, ValueError) as error:
            raise InputError(f"{scheme}://{rest}: can't be opened ({reason_of(error)})") from None
        return cls(f"{scheme}://{rest}", filesystem, root.rstrip("/"))

    def names(self, inside: str = "", depth: int | None = None) -> list[str]:
        """Every file's path in the directory, or in one inside of it; none where that is not there.

        :raises InputError: when it can't be listed, or lists a file that lies elsewhere.
        """
        top = self._path(inside)
        try:
            found = self.filesystem.find(top, **({} if depth is None else {"maxdepth": depth}))
        except FileNotFoundError:
            return []
        except Exception as error:  # what a remote file system raises has no common base
            raise InputError(
                f"{self.url}: can't be listed ({reason_of(error)}); check the address and the network, or give a local directory"
            ) from None
        return [self._inside(name) for name in found]

    def bytes_of(self, name: str) -> int | None:
        """A file's size; None where there is no such file. What was said before is not remembered.

        :raises InputError: when it can't be asked, or there is no telling.
        """
        try:
            self.filesystem.invalidate_cache()
            said = self.filesystem.info(self._path(name))
        except Exception as error:
            if _is_missing(error):
                return None
            raise self._unfetched(name, error) from None
        if said.get("type") != "file":
            return None
        if not isinstance(said.get("size"), int):
            raise InputError(f"{self.url}/{name}: the store does not say how large it is")
        return int(said["size"])

    def copy(self, names: Iterable[str], place: Path) -> None:
        """Copies files of the directory to the same paths below `place`.

        :raises InputError: when one can't be fetched, or its name leads out.
        """
        for name in names:
            path = place / self._inside(self._path(name))
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self.filesystem.get_file(self._path(name), str(path))
            except Exception as error:
                raise self._unfetched(name, error) from None

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    def _inside(self, path: str) -> str:
        """A path of the store as it is seen from the directory.

        :raises InputError: when it does not lie in it.
        """
        inside, root = PurePosixPath(path), PurePosixPath(self.root)
        if not inside.is_relative_to(root) or ".." in inside.relative_to(root).parts:
            raise InputError(f"{self.url}: {path} leads out of it")
        return inside.relative_to(root).as_posix()

    def _unfetched(self, name: str, error: Exception) -> InputError:
        return InputError(f"{self.url}/{name}: can't be fetched ({reason_of(error.__cause__ or error)})")


def _is_missing(error: Exception) -> bool:
    """Whether a store said that it has no such file. fsspec's http takes whatever goes wrong for that, and keeps the cause."""
    cause = error.__cause__
    away = type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", None) not in (404, 410)
    return isinstance(error, FileNotFoundError) and not away
