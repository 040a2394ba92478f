"""Results in a library that are no adapter's any more: their source left it. Named, and removed where that is asked for.

What goes is what `batch` wrote itself, by its marker, and nobody changed since, by the record of its files. It is moved aside
first, so that whoever reads the directory sees all of it or nothing.
"""

import secrets
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from bslora_convert.files.address import STATE
from bslora_convert.files.record import foreign, named
from bslora_convert.library.jobs import marker_of, written_by_batch
from bslora_convert.library.manifest import compact_in


def left_over(out: Path, ids: Collection[str]) -> list[str]:
    """Compact directories in a library that are none of its adapters."""
    return [name for name in compact_in(out) if name not in ids] if out.is_dir() else []


def prune(out: Path, names: Collection[str], lost: Collection[str] = ()) -> tuple[list[str], list[str]]:
    """(What was removed, notes on what was not and why). lost: where a source may come back."""
    gone, notes = [], []
    for name in names:
        place, marker = out / name, marker_of(out, name)
        link = next((one for one in lost if f"{name}/".startswith(f"{one}/")), None)
        if link is not None:
            notes.append(f"{name} was left: {link} leads to nothing now, and may come back")
            continue
        if not written_by_batch(place, marker):
            notes.append(f"{name} is no adapter of the library and was not written by `batch`: it was left")
            continue
        strange = foreign(place)
        if strange:
            notes.append(f"{name} is no adapter of the library any more; it was left, for it holds {named(strange)}")
            continue
        aside = out / STATE / f"pruned-{secrets.token_hex(4)}"
        try:
            place.rename(aside)
        except OSError as error:
            notes.append(f"{name} can't be removed ({error.strerror or error})")
            continue
        shutil.rmtree(aside, ignore_errors=True)
        marker.unlink(missing_ok=True)
        with suppress(OSError):  # one that still holds something
            for above in place.relative_to(out).parents:
                if above.parts:
                    (out / above).rmdir()
        gone.append(name)
    return gone, notes
