"""Who shares with whom on the `intra` level: a layer's modules, as in the paper, or any other groups.

`layer` is the paper's rule; `auto` clusters layers and modules (`analysis/clusters.py`) and leaves the choice to the fit.
A file of groups is JSON: {"group": ["pattern", …], …}. A pattern is a module's whole name or one with shell wildcards (`*`,
`?`, `[…]`); a module takes the first group that matches it, one that none matches shares with nobody on this level.
"""

import json
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from bslora_convert.errors import InputError
from bslora_convert.files.jsonfile import parsed
from bslora_convert.fit.source import Source

Grouping = dict[str, list[str]]
LARGEST_FILE = 16 << 20


def read_groups(path: str | Path, names: Iterable[str]) -> Grouping:
    """Groups of a file with the modules that they match; groups that match none are left out.

    :raises InputError: when the file is missing or not of this layout, or no module is matched.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; a JSON object of groups is expected, each a list of module patterns")
    value = parsed(path, json.loads, "JSON", LARGEST_FILE)
    if not isinstance(value, dict) or not all(_is_patterns(patterns) for patterns in value.values()):
        raise InputError(
            f'{path}: an object of groups is expected, each a list of module patterns: {{"group": ["*.q_proj"]}}'
        )
    found = match(value, names)
    if not found:
        raise InputError(f"{path}: no pattern matches a module of the adapter, such as {next(iter(names), 'none')}")
    return found


def match(patterns: Mapping[str, list[str]], names: Iterable[str]) -> Grouping:
    """Each name in the first group with a pattern that matches it."""
    found: Grouping = {}
    for name in names:
        group = next((g for g, mine in patterns.items() if any(fnmatchcase(name, pattern) for pattern in mine)), None)
        if group is not None:
            found.setdefault(group, []).append(name)
    return found


def candidates(source: Source, choice: str) -> dict[str, Grouping | None]:
    """What the fit may choose from, by a name for the reader; None stands for the layers.

    choice: `layer`, `auto` or a groups file.

    :raises InputError: as `read_groups`.
    """
    if choice == "layer":
        return {"layers": None}
    if choice != "auto":
        return {Path(choice).name: read_groups(choice, source.deltas)}
    from bslora_convert.analysis.clusters import partitions

    return {"layers": None, **partitions(source)}


def _is_patterns(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(pattern, str) for pattern in value)
