"""README.md of a library on the Hub: its tenants with their sizes and behaviour, and how it is served."""

from collections.abc import Mapping, Sequence
from typing import Any

from bslora_convert.library.serving import serving
from bslora_convert.library.summary import bases_of
from bslora_convert.report.commands import UNKNOWN_BASE, serving_options
from bslora_convert.report.environment import environment
from bslora_convert.report.metadata import front_matter, hub_name, metadata
from bslora_convert.version import __version__


def render(rows: Sequence[Mapping[str, Any]], address: str = "THIS_DIR") -> str:
    """The README of a library. rows: of its manifest, those of its tenants. address: where it lies, as a reader names it."""
    bases = bases_of(rows)
    base = hub_name(next(iter(bases))) if len(bases) == 1 else UNKNOWN_BASE
    whole = all("width" in row["settings"] for row in rows)
    found = serving(rows) if whole else None
    rank = found["compact"]["slot_rank"] if found else None
    return environment().get_template("library_card.md").render(
        front_matter=front_matter(metadata({}, "peft", base, None, ("lora", "bslora"))),
        rows=sorted(rows, key=lambda row: str(row["id"])),
        bases=bases,
        base=base,
        address=address,
        before=sum(row.get("source_bytes") or 0 for row in rows),
        after=sum(row.get("bytes") or 0 for row in rows),
        options=" ".join(serving_options(rank, found.get("target_modules"))) if found and rank else None,
        version=__version__,
    )  # fmt: skip
