"""What the adapters of a library share, told from what is on disk: by group who is on which bases, and bytes before and after."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bslora_convert.bslora.bases import DIRECTORY, Uses, parse
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.storage import CONFIG_NAME, WEIGHTS_NAME
from bslora_convert.errors import InputError
from bslora_convert.files.jsonfile import read_json
from bslora_convert.library.jobs import Result
from bslora_convert.library.journal import Entry, read_journal
from bslora_convert.report.page import size


def sharing(rows: Sequence[Result], out: Path, reasons: Mapping[str, str]) -> dict[str, Any] | None:
    """`sharing` of summary.json: of adapters that were decided about; None where none was.

    Bytes are those of weights, configurations and bases. `unused` are files of bases that no adapter below `out` takes any more;
    they are left for whoever knows that nothing else does. reasons: why adapters could not be looked at, by identity.
    """
    journal, keys = read_journal(out), {row.id: row.key for row in rows if row.status in ("ok", "skipped")}
    decided = {name: journal[name] for name in sorted(keys) if name in journal and journal[name].key == keys[name]}
    groups: dict[str, dict[str, Decided]] = {}
    for name, entry in decided.items():
        held = _read(out / name, entry)
        if held is not None:
            groups.setdefault(entry.group, {})[name] = held
    files = {path.stem: path.stat().st_size for path in sorted((out / DIRECTORY).glob("*.safetensors"))}
    used = {_named(path) for path in out.rglob(CONFIG_NAME)} if files else set()
    unused = {file: count for file, count in files.items() if file not in used}
    if not groups and not reasons and not unused:
        return None
    told = [_group(members, files) for members in groups.values()]
    return {
        "bytes": {
            "separate": sum(group["bytes"]["separate"] for group in told),
            "adapters": sum(group["bytes"]["adapters"] for group in told),
            "bases": sum(files.values()) - sum(unused.values()),
            "unused": sum(unused.values()),
        },
        "groups": told,
        "unused": [f"{DIRECTORY}/{file}.safetensors" for file in unused],
        "left_out": dict(reasons),
    }


@dataclass(frozen=True, slots=True)
class Decided:
    """One adapter as it stands: what the journal says, its base, its modules, the bases that it uses, bytes of its two files."""

    entry: Entry
    base_model: str | None
    modules: int
    uses: Uses | None
    bytes: int


def _read(directory: Path, entry: Entry) -> Decided | None:
    """What was decided, where it is also what is on disk."""
    path = directory / CONFIG_NAME
    try:
        config = read_json(path)
        layout = Layout.parse(config, path)
        uses = parse(config, layout.modules, path) if config.get("bases") is not None else None
        size = sum((directory / file).stat().st_size for file in (WEIGHTS_NAME, CONFIG_NAME))
    except (InputError, OSError):
        return None
    base = config.get("base_model_name_or_path")
    held = Decided(entry, base if isinstance(base, str) else None, len(layout.modules), uses, size)
    return held if (uses.file if uses else None) == entry.bases else None


def _named(path: Path) -> str:
    """The bases that a configuration names."""
    try:
        return str(read_json(path).get("bases"))
    except (InputError, OSError):
        return ""


def _group(members: Mapping[str, Decided], files: Mapping[str, int]) -> dict[str, Any]:
    """One group: the adapters of a base with the same modules and shapes."""
    first = next(iter(members.values()))
    clusters: dict[str, dict[str, Decided]] = {}
    for name, held in members.items():
        if held.uses is not None:
            clusters.setdefault(held.uses.file, {})[name] = held
    told = {
        "base_model": first.base_model,
        "modules": first.modules,
        "adapters": len(members),
        "shared": [
            {
                "bases": file,
                "adapters": list(mine),
                "modules": dict(Counter(_ways(mine.values()).values())),
                "bytes": _bytes(mine.values(), files.get(file, 0)),
            }
            for file, mine in clusters.items()
        ],
        "separate": [name for name, held in members.items() if held.uses is None],
        "bytes": _bytes(members.values(), sum(files.get(file, 0) for file in clusters)),
    }
    return {**told, "words": _words(told)}


def _ways(members: Iterable[Decided]) -> dict[str, str]:
    """How each module that some adapter has on bases is: `left`, `right` or `both`."""
    sizes = {name: sizes for held in members if held.uses for name, sizes in held.uses.sizes.items()}
    return {name: {"C": "both", "A": "left", "B": "right"}[size.factor] for name, size in sizes.items()}


def _bytes(members: Iterable[Decided], bases: int) -> dict[str, int]:
    held = list(members)
    return {
        "separate": sum(one.entry.bytes for one in held),
        "adapters": sum(one.bytes for one in held),
        "bases": bases,
    }


def _words(group: Mapping[str, Any]) -> str:
    """The group in a sentence."""
    count, on, amount = group["adapters"], sum(len(cluster["adapters"]) for cluster in group["shared"]), group["bytes"]
    name = group["base_model"] or "a base without a name"
    if count == 1:
        return f"{name}: one adapter, which has no other to share with."
    if not on:
        return (
            f"{name}: {count} adapters share nothing: no bases hold several of them at the same error in fewer bytes. "
            "They stay separate."
        )
    files = "one set of bases" if len(group["shared"]) == 1 else f"{len(group['shared'])} sets of bases"
    left = count - on
    rest = f"; {left} {'stays' if left == 1 else 'stay'} separate" if left else ""
    return (
        f"{name}: {on} of {count} adapters are on {files}{rest}. {size(amount['separate'])} became "
        f"{size(amount['adapters'] + amount['bases'])}, {size(amount['bases'])} of it bases."
    )
