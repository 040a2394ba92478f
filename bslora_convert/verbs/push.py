"""`push`: a result or a library onto the Hub."""

from pathlib import Path

from bslora_convert.errors import InputError
from bslora_convert.files.hub import check_push, upload
from bslora_convert.report.published import published
from bslora_convert.results.library import Pushed


def push(directory: str | Path, repo: str, *, reports: bool = False, dry_run: bool = False) -> Pushed:
    """Uploads an adapter, or the tenants of a library each in its folder, and says what was uploaded.

    Nothing that says where it lay here goes along (`report/published.py`). repo: `org/name`; one that is not there is made,
    private as the account says. reports: pages and measurements too, which hold rows of prompts. dry_run: uploads nothing.

    :raises InputError: when the directory holds no result, or nobody is logged in. :raises RecipeError: for a name that is none,
        or when a package is missing. :raises OutputError: when it can't be uploaded; what is here stays.
    """
    place = Path(directory)
    if not place.is_dir():
        raise InputError(f"{place}: no such directory")
    check_push(repo, dry_run)
    return upload(published(place, repo, reports), repo, dry_run=dry_run)
