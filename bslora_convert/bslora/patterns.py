"""Names of modules -> a few patterns and back: `model.layers.{0-29}.mlp.experts.{0-63}.up_proj`.

A pattern stands for its names in natural order, the last range running fastest. A range stands for a whole part of a name.
"""

import math
import re
from collections.abc import Collection, Iterator, Sequence
from itertools import product

from bslora_convert.errors import InputError
from bslora_convert.modules.names import natural_order

NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,8})(?![^.])")  # a whole part of a name, as it is counted
RANGE = re.compile(r"(?<![^.])\{(0|[1-9][0-9]{0,8})-([1-9][0-9]{0,8})\}(?![^.])")
MOST = 1 << 17  # names of all patterns of an adapter
LONGEST, DEEPEST = 1 << 12, 64  # characters and dots of one
Range = tuple[int, int]


def patterns(names: Collection[str]) -> dict[str, list[str]]:
    """As few patterns as whole boxes of numbers allow, each with its names in order.

    :raises InputError: for a name with braces in it, which would be read as a pattern.
    """
    alike: dict[str, set[tuple[int, ...]]] = {}
    for name in names:
        if "{" in name or "}" in name:
            raise InputError(f"{name!r} has braces in it, which no module's name has")
        if len(name) > LONGEST or name.count(".") > DEEPEST:
            raise InputError(f"{name[:60]}…: a name of {len(name)} characters in {name.count('.') + 1} parts")
        alike.setdefault(NUMBER.sub("{}", name), set()).add(tuple(int(number) for number in NUMBER.findall(name)))
    found = {}
    for template in sorted(alike, key=natural_order):
        for box in _boxes(alike[template]):
            words = [str(low) if low == high else f"{{{low}-{high}}}" for low, high in box]
            found[template.format(*words)] = [template.format(*numbers) for numbers in _numbers(box)]
    return found


def names_of(pattern: str, most: int, where: object) -> list[str]:
    """The names that a pattern stands for.

    :raises InputError: naming `where`, for braces that are no range, and for more than `most` names.
    """
    if len(pattern) > LONGEST or pattern.count(".") > DEEPEST:
        raise InputError(f"{where}: a name of {len(pattern)} characters")
    box = [(int(match[1]), int(match[2])) for match in RANGE.finditer(pattern)]
    template = RANGE.sub("{}", pattern)
    if any(low >= high for low, high in box) or set(RANGE.sub("", pattern)) & {"{", "}"}:
        raise InputError(f"{where}: {pattern!r} is neither a name nor a pattern like layers.{{0-29}}.up_proj")
    if math.prod(high - low + 1 for low, high in box) > most:
        raise InputError(f"{where}: {pattern!r} stands for more than {most} names")
    return [template.format(*numbers) for numbers in _numbers(box)]


def _boxes(numbers: Collection[tuple[int, ...]]) -> Iterator[list[Range]]:
    """Boxes that hold these numbers and no others, each once."""
    if numbers == {()}:
        yield []
        return
    rests: dict[int, set[tuple[int, ...]]] = {}
    for first, *rest in numbers:
        rests.setdefault(first, set()).add(tuple(rest))
    runs: list[Range] = []
    for first in sorted(rests):
        if runs and runs[-1][1] == first - 1 and rests[first] == rests[runs[-1][0]]:
            runs[-1] = (runs[-1][0], first)
        else:
            runs.append((first, first))
    for run in runs:
        for box in _boxes(rests[run[0]]):
            yield [run, *box]


def _numbers(box: Sequence[Range]) -> Iterator[tuple[int, ...]]:
    return product(*(range(low, high + 1) for low, high in box))
