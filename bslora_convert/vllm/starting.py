"""What a server looks at before it starts: whether its tenants could be served at all.

library     is there, can be read, and its manifest is whole
adapters    are of a version that is known here; some that are not are named, and where none is the server does not start
cache       can be made, and written to: a file of `PROBE` bytes
"""

import os
import secrets
from itertools import islice

from bslora_convert.bslora.codes.decode import make_ready
from bslora_convert.bslora.storage import CONFIG_NAME, check_version
from bslora_convert.errors import InputError
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.record import named
from bslora_convert.library.manifest import DONE, compact_in
from bslora_convert.vllm.library import Elsewhere, Here, opened
from bslora_convert.vllm.settings import Settings
from bslora_convert.vllm.snapshots import Snapshots

PROBE = 1 << 20
LOOKED_AT = 10_000  # adapters whose version is looked at


def check(settings: Settings) -> list[str]:
    """What the log should have about a library that can be served.

    :raises InputError: when none of it can be. :raises OSError: when the cache can't be used.
    """
    library = opened(settings.library)
    said = _versions(library) if isinstance(library, Here) else []
    if isinstance(library, Elsewhere):
        library.rows()
    _check_cache(settings)
    return said


def warm_up() -> None:
    """Has everything that the first adapter needs imported and compiled before it is asked for."""
    try:
        make_ready()
    except Exception:  # it is the first adapter that says so
        return


def _versions(library: Here) -> list[str]:
    rows = library.rows()
    names = compact_in(library.place) if rows is None else (row["id"] for row in rows.values() if row["status"] in DONE)
    known, strange = 0, []
    for name in islice(names, LOOKED_AT):
        try:
            check_version(read_json(library.place / name / CONFIG_NAME), name)
            known += 1
        except InputError as error:
            strange.append(str(error))
    if strange and not known:
        raise InputError(f"{library.place}: holds no adapter that can be served: {named(strange, 1)}")
    return [f"{len(strange)} adapters can't be served: {named(strange)}"] if strange else []


def _check_cache(settings: Settings) -> None:
    """:raises OSError: naming the cache."""
    try:
        held = Snapshots(settings.cache, settings.cache_bytes, settings.plan)
        held.close()
        probe = settings.cache / f".probe-{secrets.token_hex(4)}"
        try:
            with probe.open("wb") as file:
                file.write(bytes(PROBE))
                file.flush()
                os.fsync(file.fileno())
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise OSError(
            f"BSLORA_CACHE {settings.cache} can't be written to ({error.strerror or error}): give it a place with room, a "
            "memory-backed one (/dev/shm) where the root is read-only"
        ) from None
