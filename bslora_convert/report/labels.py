"""Labels of plots: short enough to be read, few enough to stand beside each other."""

import math
from collections.abc import Sequence

OUTSIDE = "–"  # modules that stand in no numbered layer
LETTER, LINE = 0.08, 0.17  # inches that a letter and a line of the plots' type take
FEW = 4  # letters of a label that is rather left out than turned


def short_layers(layers: Sequence[str | None]) -> list[str]:
    """Numbers alone where all layers have one prefix, else the number behind what tells the prefixes apart."""
    prefixes = list(dict.fromkeys(layer.rpartition(".")[0] for layer in layers if layer))
    apart = dict(zip(prefixes, _apart(prefixes), strict=True))
    shown = []
    for layer in layers:
        prefix, _, number = (layer or OUTSIDE).rpartition(".")
        shown.append(".".join(part for part in (apart.get(prefix, ""), number) if part))
    return shown


def tail(label: str, letters: int) -> str:
    """The end of a label that is too long."""
    return label if len(label) <= letters else f"…{label[1 - letters :]}"


def beside(labels: Sequence[str], room: float) -> tuple[range, bool]:
    """Which of the labels have a place in `room` inches along an axis, and whether they must be turned for it."""
    longest = max(map(len, labels), default=0)
    turned = longest > FEW and len(labels) * (longest + 2) * LETTER > room
    return every(len(labels), LINE if turned else (longest + 2) * LETTER, room), turned


def every(count: int, size: float, room: float) -> range:
    """Evenly spread positions of so many labels of a size that don't touch in `room` inches."""
    return range(0, count, max(1, math.ceil(count * size / max(room, size))))


def _apart(prefixes: Sequence[str]) -> list[str]:
    """The fewest leading parts that tell dotted names apart, behind the parts that all of them begin with."""
    parts = [prefix.split(".") for prefix in prefixes]
    if len(parts) <= 1:
        return [""] * len(parts)
    common = next(
        (place for place in range(min(map(len, parts))) if len({part[place] for part in parts}) > 1),
        min(map(len, parts)),
    )
    for length in range(1, max(map(len, parts)) + 1):
        found = [".".join(part[common : common + length]) for part in parts]
        if len(set(found)) == len(found):
            return found
    return list(prefixes)
