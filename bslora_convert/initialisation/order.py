"""In which order modules are drawn: what names say, and what layers walked through have taught.

A layer's modules come in the order of its class's constructor, which names don't say. Every pair that was found side by side is a
link from kind to kind, with the gap between the two. Later layers are expected to be linked in the same way; a module that is
missing from the file is passed by its size in other layers.
"""

import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, takewhile

from bslora_convert.initialisation.drawn import Module
from bslora_convert.modules.names import kind_of, layer_of, natural_order

CHAIN = 8  # modules in a row that may be missing
GUESSES = 64
AHEAD = 4  # layers
BESIDE = 64  # modules of the same layer
HELD = 4  # links of a kind


@dataclass(frozen=True, slots=True)
class Link:
    """What follows a module of a kind: another kind, so many layers later, after a gap of draws that neither accounts for."""

    kind: str
    later: int
    gap: int


class Order:
    """Layers of a model and links between kinds."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self._modules = modules
        names = sorted(modules, key=natural_order)
        self._pattern = {name: re.sub(r"(?<![^.])\d+(?![^.])", "#", name) for name in names}
        self._layers: dict[str, list[str]] = {}  # names of each layer, "" for those outside
        for name in names:
            self._layers.setdefault(layer_of(name) or "", []).append(name)
        self._stacks: dict[str, list[str]] = {}  # layers of each stack
        for layer in self._layers:
            self._stacks.setdefault(_stack(layer), []).append(layer)
        self._place = {layer: place for stack in self._stacks.values() for place, layer in enumerate(stack)}
        self._links: dict[str, list[Link]] = {}
        self._sizes: dict[str, Module] = {}  # the last module seen of each kind

    def learn(self, before: str, name: str, gap: int) -> None:
        """Notes that one module followed another."""
        self._sizes[kind_of(name)] = self._modules[name]
        one, other = layer_of(before) or "", layer_of(name) or ""
        if _stack(one) != _stack(other):
            return
        link = Link(kind_of(name), self._place[other] - self._place[one], gap)
        links = self._links.setdefault(kind_of(before), [])
        if link in links:
            links.remove(link)
        links.insert(0, link)
        del links[HELD:]

    def predicted(self, name: str, left: Container[str]) -> Iterator[tuple[str, int]]:
        """Modules that may follow this one if its layer is like others, each with the draws between its A₀ and its own lead."""
        reached, guesses = [(layer_of(name) or "", kind_of(name), 0)], 0
        for _ in range(CHAIN):
            ahead = []
            for layer, kind, passed in reached:
                for link in self._links.get(kind, ()):
                    then = self._later(layer, link.later)
                    if then is None or guesses == GUESSES:
                        continue
                    guesses += 1
                    follower = f"{then}.{link.kind}" if then else link.kind
                    if follower in left:
                        yield follower, passed + link.gap
                    known = self._modules.get(follower, self._sizes[link.kind])
                    ahead.append((then, link.kind, passed + link.gap + known.lead + known.size))
            reached = ahead

    def near(self, name: str, left: Container[str], backward: bool = False) -> list[str]:
        """Modules that stand beside this one by name: of its layer, of some next ones, and of the first in each stack."""
        own, way = layer_of(name) or "", -1 if backward else 1
        beside = [each for each in self._layers[own] if each in left]
        beside.sort(key=lambda each: -_shared(each, name))
        layers = [self._later(own, way * far) for far in range(1, AHEAD + 1)]
        for stack in self._stacks.values():
            held = (layer for layer in stack[::way] if any(each in left for each in self._layers[layer]))
            layers += islice(held, AHEAD)
        alike = {
            (layer, self._pattern[each]): each
            for layer in dict.fromkeys(layers)
            if layer is not None and layer != own
            for each in reversed(self._layers[layer][::way])
            if each in left
        }
        return [*beside[:BESIDE], *alike.values()]

    def first_of_each(self, number: int = 1) -> list[str]:
        """Modules that may be drawn first: of names that differ in numbers alone, the first; then the second and so on."""
        alike: dict[str, list[str]] = {}
        for name, pattern in self._pattern.items():
            alike.setdefault(pattern, []).append(name)
        return [names[place] for place in range(number) for names in alike.values() if place < len(names)]

    def _later(self, layer: str, layers: int) -> str | None:
        stack, place = self._stacks[_stack(layer)], self._place[layer] + layers
        return stack[place] if 0 <= place < len(stack) else None


def _stack(layer: str) -> str:
    return layer.rpartition(".")[0]


def _shared(name: str, other: str) -> int:
    """Parts with which two names begin alike."""
    pairs = zip(name.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
