"""How an adapter is named on the command line and in Python: a directory, or `LIBRARY::ID` for one of a library."""

from pathlib import Path

from bslora_convert.errors import InputError
from bslora_convert.library.items import check_id

MARK = "::"


def resolve(path: str | Path) -> Path:
    """The directory or file that is meant; a path that is there as it is written is never taken apart.

    :raises InputError: for an identity that no library gives out, or a library that is no directory.
    """
    if MARK not in str(path) or _is_there(Path(path)):
        return Path(path)
    library, _, name = str(path).rpartition(MARK)
    check_id(name, str(path))
    if not Path(library).is_dir():
        raise InputError(f"{path}: {library or 'the library'} is no directory; LIBRARY{MARK}ID is expected")
    return Path(library) / name


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file system takes
        return False
