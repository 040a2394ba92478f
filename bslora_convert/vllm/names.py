"""Names of tenants: those that a library gives out, and nothing outside of it."""

from pathlib import Path

from bslora_convert.errors import InputError
from bslora_convert.files.address import check_id
from bslora_convert.lora.place import CONFIG_NAME


def find(library: Path, name: str) -> Path | None:
    """The directory of a tenant; None for a name that no library gives out, or that leads to no adapter inside of this one.

    No library gives out an absolute name, one that leads up, a hidden one, or one with a backslash or a NUL.
    """
    if not is_given_out(name):
        return None
    place, root = library / name, library.resolve()
    try:
        found = place.resolve(strict=True)
    except (OSError, ValueError):
        return None
    return found if root in found.parents and (found / CONFIG_NAME).is_file() else None


def being_replaced(library: Path, name: str) -> bool:
    """Whether a result is about to take a tenant's place: what stood there has been moved aside (`files/landing.py`)."""
    place = library / name
    return is_given_out(name) and any(place.parent.glob(f".{place.name}.old-*"))


def is_given_out(name: str) -> bool:
    """Whether a library may hold a tenant of this name."""
    try:
        check_id(name, "request")
    except InputError:
        return False
    return True
