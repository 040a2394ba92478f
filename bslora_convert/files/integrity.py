"""Whether a compact directory's weights are what was written: by its record, or by the checksum in their own header."""

from pathlib import Path

from bslora_convert.files.hashing import sha256
from bslora_convert.files.record import recorded
from bslora_convert.files.tensorfile import holds_its_checksum

AS_WRITTEN, CHECKED, CHANGED, NO_RECORD = "as written", "checked", "changed", "no record"


def integrity(directory: Path, weights: Path) -> str:
    """Whether weights are still what was written and measured.

    as written    the directory's record has their hash, and the figures in it are of them
    checked       no record is there, and they are what their own header has the checksum of
    changed       they are not
    no record     nothing says what was written

    :raises InputError: when the record or the header is damaged.
    """
    expected = recorded(directory).get("compact", {}).get("sha256")
    if isinstance(expected, str):
        return AS_WRITTEN if sha256(weights) == expected else CHANGED
    held = holds_its_checksum(weights)
    return NO_RECORD if held is None else CHECKED if held else CHANGED
