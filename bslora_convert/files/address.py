"""How an adapter is named on the command line and in Python: a directory, `LIBRARY::ID` for one of a library, or a URL."""

import re
from pathlib import Path

from bslora_convert.errors import InputError
from bslora_convert.files.remote import fetched
from bslora_convert.files.store import is_url

MARK = "::"
PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=@-]*")
LONGEST_ID = 200
STATE = ".batch"  # directory of a library made by `batch` that holds a marker for each adapter
MANIFEST, SUMMARY, PAGE, CARD = OWN_FILES = (
    "manifest.jsonl",
    "summary.json",
    "report.html",
    "README.md",
)  # beside adapters


def resolve(path: str | Path) -> Path:
    """The directory or file that is meant; a path that is there as it is written is never taken apart. A URL is fetched.

    :raises InputError: for an identity that no library gives out, a library that is no directory, or a URL that can't be fetched.
    :raises RecipeError: when fetching needs a package that is missing.
    """
    if _is_there(Path(path)) or (MARK not in str(path) and not is_url(path)):
        return Path(path)
    if MARK not in str(path):
        return fetched(str(path))
    library, _, name = str(path).rpartition(MARK)
    check_id(name, str(path))
    if is_url(library):
        return fetched(library, name)
    if not Path(library).is_dir():
        raise InputError(f"{path}: {library or 'the library'} is no directory; LIBRARY{MARK}ID is expected")
    return Path(library) / name


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file system takes
        return False


def check_id(name: str, where: str) -> None:
    """Refuses an identity that can't be a directory of a result.

    :raises InputError: naming it.
    """
    parts = name.split("/")
    if len(name) > LONGEST_ID or not all(PART.fullmatch(part) for part in parts):
        raise InputError(
            f"{where}: id {name!r}: letters, digits and . _ + = @ - between slashes are allowed, {LONGEST_ID} at most"
        )
    if parts[0] in OWN_FILES:
        raise InputError(f"{where}: id {name!r} is the name of a file that the result has itself")
