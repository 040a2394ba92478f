"""Which adapters of a model are decoded at the moment: at most so many bytes of them.

An adapter that is asked for takes the room of those that were used longest ago, but never of one that was used since it was asked
for last itself: in a batch of more adapters than there is room for, some stay decoded from layer to layer instead of each driving
out the next.
"""

from collections import OrderedDict
from typing import Protocol

from bslora_convert.errors import RecipeError

DECODED_BYTES = 1 << 30


class Holder(Protocol):
    """What can be held decoded."""

    @property
    def decoded_bytes(self) -> int:
        """Bytes that it takes once it is."""

    def forget(self) -> None:
        """Lets go of what is decoded."""


class Decoded:
    """The adapters of one model that are decoded, those used longest ago first."""

    def __init__(self) -> None:
        self._limit = DECODED_BYTES
        self._held: OrderedDict[Holder, int] = OrderedDict()  # with the bytes that each was counted at
        self._latest: Holder | None = None
        self._asked: dict[Holder, int] = {}
        self._clock = 0

    @property
    def bytes(self) -> int:
        """What is decoded takes so much."""
        return sum(self._held.values())

    @property
    def limit(self) -> int:
        """Bytes that may be decoded."""
        return self._limit

    @limit.setter
    def limit(self, value: int) -> None:
        """:raises RecipeError: when it is no whole number from 0."""
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise RecipeError(f"decoded_bytes is {value!r}: a whole number of bytes from 0 is allowed", "decoded_bytes")
        self._limit = value
        while self.bytes > value:
            self.drop(next(iter(self._held)))

    def used(self, holder: Holder) -> None:
        """Notes that a held one is used."""
        if holder is not self._latest:
            self._clock += 1
            self._asked[holder] = self._clock
            self._held.move_to_end(holder)
            self._latest = holder

    def take(self, holder: Holder) -> bool:
        """Makes room for one that is asked for and counts it as held; False where there is none to be had."""
        before = self._asked.get(holder)
        self._clock += 1
        self._asked[holder] = self._clock
        room, going = self._limit - self.bytes, []
        for other, size in self._held.items():
            if room >= holder.decoded_bytes or (before is not None and self._asked[other] > before):
                break
            going.append(other)
            room += size
        if room < holder.decoded_bytes:
            return False
        for other in going:
            self.drop(other)
        self._held[holder] = holder.decoded_bytes
        self._latest = holder
        return True

    def drop(self, holder: Holder) -> None:
        """Lets one go, whether it is held or not; it may be asked for again."""
        if self._held.pop(holder, None) is not None:
            holder.forget()
        if self._latest is holder:
            self._latest = None

    def remove(self, holder: Holder) -> None:
        """Lets one go for good."""
        self.drop(holder)
        self._asked.pop(holder, None)
