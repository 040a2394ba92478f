"""From one module that was found through the stream to all others.

A module's own draws begin where the last one's end, or after a gap: what older versions draw, an embedding, a module that is not in
the file. Learned gaps are tried first, then known ones, then the stretch that follows is searched by correlation.
"""

from collections.abc import Iterator, Mapping

from bslora_convert.initialisation.correlate import Detector
from bslora_convert.initialisation.drawn import FORMS, Module, added, passed
from bslora_convert.initialisation.match import FEW, HEAD, Heads, matches
from bslora_convert.initialisation.order import Order
from bslora_convert.initialisation.tape import Tape

WINDOWS = (1 << 17, 1 << 19, 1 << 22)  # draws beyond a gap that are searched, the nearest first
SOUGHT = 48  # modules, in a window
BESIDE = 32  # modules that are tried after each known gap


class Walk:
    """Modules placed in a stream, in its order after `run`."""

    def __init__(self, modules: Mapping[str, Module], embeddings: list[Module], heads: Heads, tape: Tape) -> None:
        self._modules, self._heads, self._tape = modules, heads, tape
        self._order = Order(modules)
        self._passed = sorted({count for embedding in embeddings for count in passed(embedding)})
        self._left = dict.fromkeys(modules)
        self._firsts: dict[str, int] = {}
        self._cosines: dict[str, float] = {}

    def place(self, name: str, first: int, cosine: float) -> None:
        """Takes a module as found."""
        del self._left[name]
        self._firsts[name], self._cosines[name] = first, cosine

    def run(self) -> tuple[dict[str, int], dict[str, float]]:
        """Places all that can be: first draws and cosines, in the order of the stream."""
        for name in self._in_order():
            self._fill(name)
        while self._begin_earlier():
            pass
        order = self._in_order()
        return {name: self._firsts[name] for name in order}, {name: self._cosines[name] for name in order}

    @property
    def beginning(self) -> int:
        """Where the first module's own draws began, by the form that most modules have."""
        first, *others = self._in_order()
        at, agreed = self._end(first), [0] * FORMS
        for name in others:
            gap = self._firsts[name] - self._modules[name].lead - at
            for form in range(FORMS):
                agreed[form] += gap == added(self._modules[name], form)
            at = self._end(name)
        module = self._modules[first]
        begun = self._firsts[first] - module.lead
        own = added(module, agreed.index(max(agreed)))
        return begun - own if own <= begun else begun

    def _in_order(self) -> list[str]:
        return sorted(self._firsts, key=self._firsts.__getitem__)

    def _end(self, name: str) -> int:
        return self._firsts[name] + self._modules[name].size

    def _fill(self, last: str) -> None:
        """Places modules after this one, up to the next that has a place."""
        later = [name for name, first in self._firsts.items() if first > self._firsts[last]]
        until = min((self._firsts[name] - self._modules[name].lead for name in later), default=None)
        while self._left:
            name = self._follower(last, until) or self._beyond(last, until)
            if name is None:
                return
            self._order.learn(last, name, self._firsts[name] - self._modules[name].lead - self._end(last))
            last = name

    def _follower(self, last: str, until: int | None) -> str | None:
        """The module that stands after a gap that can be told, now placed."""
        for name, gap in self._told(last):
            module = self._modules[name]
            first = self._end(last) + gap + module.lead
            if until is None or first + module.size <= until:
                cosine = matches(name, first, self._heads, self._tape, predicted=True)
                if cosine is not None:
                    self.place(name, first, cosine)
                    return name
        return None

    def _told(self, last: str) -> Iterator[tuple[str, int]]:
        yield from self._order.predicted(last, self._left)
        near = self._order.near(last, self._left)
        yield from ((name, 0) for name in near)
        for name in near[:BESIDE]:
            for form in range(FORMS):
                own = added(self._modules[name], form)
                yield from ((name, own + embedding) for embedding in (0, *self._passed) if own + embedding)

    def _beyond(self, last: str, until: int | None) -> str | None:
        """The next module in the stretch after this one, now placed."""
        at, near = self._end(last), self._order.near(last, self._left)
        for window in WINDOWS:
            end = at + window if until is None else min(at + window, until)
            name = self._sighted(near, at, end, until)
            if name is not None or end == until:
                return name
        return None

    def _begin_earlier(self) -> bool:
        """Looks for modules before the first, and goes forward from the earliest; False where there are none."""
        first = self._in_order()[0]
        until = self._firsts[first] - self._modules[first].lead
        near = self._order.near(first, self._left, backward=True)
        if until <= min((2 * self._modules[name].size for name in near), default=until):
            return False
        name = self._sighted(near, max(until - WINDOWS[-1], 0), until, until)
        if name is not None:
            self._fill(name)
        return name is not None

    def _sighted(self, names: list[str], begin: int, end: int, until: int | None) -> str | None:
        """The first of these modules whose A₀ begins in a stretch and ends before `until`, now placed."""
        sought = {name: self._heads.of(name) for name in names if self._modules[name].size >= FEW}
        heads = dict([(name, head) for name, head in sought.items() if head is not None][:SOUGHT])
        if not heads or end <= begin:
            return None
        for position, group in Detector(heads).peaks(self._tape.read(begin, end - begin + HEAD)):
            for name in group:
                first, module = begin + position, self._modules[name]
                if first >= begin + module.lead and (until is None or first + module.size <= until):
                    cosine = matches(name, first, self._heads, self._tape)
                    if cosine is not None:
                        self.place(name, first, cosine)
                        return name
        return None
