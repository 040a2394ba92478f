"""From one module that was found through the stream to all others.

A module's own draws begin where the last one's end, or after a gap: what older versions draw, an embedding, a module that is not
in the file. Learned gaps are tried first, then known ones, then the stretch that follows is searched by correlation.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise

from bslora_convert.initialisation.correlate import Detector
from bslora_convert.initialisation.drawn import FORMS, Module, added, passed
from bslora_convert.initialisation.match import FEW, HEAD, Heads, matches
from bslora_convert.initialisation.order import Order
from bslora_convert.initialisation.tape import Tape

WINDOWS = (1 << 17, 1 << 19, 1 << 22)  # draws beyond a gap that are searched, the nearest first
SOUGHT = 48  # modules, in a window
TRIED = 32  # modules, after each known gap


class Walk:
    """Modules placed in a stream, in its order after `run`."""

    def __init__(self, modules: Mapping[str, Module], embeddings: list[Module], heads: Heads, tape: Tape) -> None:
        self._modules, self._heads, self._tape = modules, heads, tape
        self._order = Order(modules)
        self._passed = sorted({count for embedding in embeddings for count in passed(embedding)})
        self._left = dict.fromkeys(modules)
        self._empty: set[int] = set()  # forms of gaps
        self._firsts: dict[str, int] = {}
        self._cosines: dict[str, float] = {}

    def place(self, name: str, first: int, cosine: float) -> None:
        """Takes a module as found."""
        del self._left[name]
        self._firsts[name], self._cosines[name] = first, cosine

    def run(self) -> tuple[dict[str, int], dict[str, float]]:
        """Places all that can be: first draws and cosines, in the order of the stream."""
        order = self._in_order()
        for name, following in zip(order, [*order[1:], None], strict=True):
            self._fill(name, following)
        while self._begin_earlier():
            pass
        order = self._in_order()
        return {name: self._firsts[name] for name in order}, {name: self._cosines[name] for name in order}

    @property
    def beginning(self) -> int:
        """Where the first module's own draws began, by the form that most modules have."""
        order, agreed = self._in_order(), [0] * FORMS
        for name, then in pairwise(order):
            for form in range(FORMS):
                agreed[form] += self._gap(name, then) == added(self._modules[then], form)
        module = self._modules[order[0]]
        begun = self._firsts[order[0]] - module.lead
        own = added(module, agreed.index(max(agreed))) if 2 * max(agreed) > len(order) - 1 else 0
        return begun - own if own <= begun else begun

    def _in_order(self) -> list[str]:
        return sorted(self._firsts, key=self._firsts.__getitem__)

    def _end(self, name: str) -> int:
        return self._firsts[name] + self._modules[name].size

    def _begun(self, name: str) -> int:
        return self._firsts[name] - self._modules[name].lead

    def _gap(self, name: str, then: str) -> int:
        return self._begun(then) - self._end(name)

    def _learn(self, name: str, then: str) -> None:
        self._order.learn(name, then, self._gap(name, then))

    def _fill(self, last: str, following: str | None, search: bool = True) -> None:
        """Places modules after this one, up to the next that has a place; without a search only after gaps that can be told."""
        until = None if following is None else self._begun(following)
        while self._left:
            name = self._follower(last, until) or (self._beyond(last, until) if search else None)
            if name is None:
                break
            self._fill_gap(last, name)
            last = name
        if following is not None:
            self._learn(last, following)

    def _fill_gap(self, last: str, name: str) -> None:
        """Places what stands between two modules; a search is spared where the gap is of a form that was seen to be empty."""
        gap, gaps, placed = self._gap(last, name), self._gaps(name), len(self._firsts)
        form = gaps.index(gap) if gap in gaps else None
        self._fill(last, name, search=form not in self._empty) if gap else self._learn(last, name)
        if form is not None and placed == len(self._firsts):
            self._empty.add(form)

    def _gaps(self, name: str) -> list[int]:
        """Gaps before a module that can be told."""
        forms = [added(self._modules[name], form) for form in range(FORMS)]
        return [own + embedding for embedding in (0, *self._passed) for own in forms]

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
        for name in near[:TRIED]:
            yield from ((name, gap) for gap in self._gaps(name)[1:])

    def _beyond(self, last: str, until: int | None) -> str | None:
        """The next module in the stretch after this one, now placed."""
        at, near = self._end(last), self._order.near(last, self._left)
        begin = at + min((self._modules[name].lead for name in near), default=0)
        for window in WINDOWS:
            end = begin + window if until is None else min(begin + window, until)
            name = self._sighted(near, at, (begin, end), until)
            if name is not None or end == until:
                return name
        return None

    def _begin_earlier(self) -> bool:
        """Looks for modules before the first, and goes forward from the earliest; False where there are none."""
        first = self._in_order()[0]
        until = self._begun(first)
        near = self._order.near(first, self._left, backward=True)
        if until < min((self._modules[name].lead + self._modules[name].size for name in near), default=until + 1):
            return False
        name = self._sighted(near, 0, (max(until - WINDOWS[-1], 0), until), until)
        if name is not None:
            self._fill(name, first)
        return name is not None

    def _sighted(self, names: list[str], at: int, stretch: tuple[int, int], until: int | None) -> str | None:
        """The first of these modules whose A₀ begins in a stretch, now placed; its own draws between `at` and `until`."""
        begin, end = stretch
        sought = {name: self._heads.of(name) for name in names if self._modules[name].size >= FEW}
        heads = dict([(name, head) for name, head in sought.items() if head is not None][:SOUGHT])
        if not heads or end <= begin:
            return None
        for position, group in Detector(heads).peaks(self._tape.read(begin, end - begin + HEAD)):
            for name in group:
                first, module = begin + position, self._modules[name]
                if first >= at + module.lead and (until is None or first + module.size <= until):
                    cosine = matches(name, first, self._heads, self._tape)
                    if cosine is not None:
                        self.place(name, first, cosine)
                        return name
        return None
