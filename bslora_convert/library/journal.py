"""What was decided about each adapter of a library: which bases it shares, or that it stands alone.

`OUT/.batch/sharing.json` is written when the bases have landed and before an adapter is written anew. So a run that was killed is
finished as it was decided, and what was decided once stays: later adapters never change earlier ones.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from bslora_convert.bslora.bases import HASH
from bslora_convert.errors import InputError
from bslora_convert.files.address import STATE
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.landing import replace_file

NAME = "sharing.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapter. key: of its conversion; group: hash of base, modules and shapes; bases: hash of the file or None.

    bytes: of weights and configuration when it was converted separately.
    """

    key: str
    group: str
    bases: str | None
    bytes: int


def read_journal(out: Path) -> dict[str, Entry]:
    """Entries by identity; nothing where none was written, and damaged entries as if they had not been."""
    found = {}
    with suppress(InputError, AttributeError):
        for name, fields in read_json(out / STATE / NAME).get("adapters", {}).items():
            with suppress(TypeError):
                entry = Entry(**fields)
                texts = isinstance(entry.key, str) and isinstance(entry.group, str) and type(entry.bytes) is int
                known = entry.bases is None or (isinstance(entry.bases, str) and HASH.fullmatch(entry.bases))
                if texts and known:
                    found[name] = entry
    return found


def write_journal(out: Path, entries: Mapping[str, Entry]) -> None:
    """Replaces the journal.

    :raises OutputError: when it can't be written.
    """
    rows = {name: asdict(entries[name]) for name in sorted(entries)}
    replace_file(
        out / STATE / NAME, json.dumps({"schema_version": SCHEMA_VERSION, "adapters": rows}, sort_keys=True) + "\n"
    )
