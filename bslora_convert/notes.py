"""Notes of a result, for its reader. Records hold each as one text, an urgent one with a mark in front."""

from dataclasses import dataclass
from typing import Literal, Self

Level = Literal["note", "attention"]
ATTENTION = "ATTENTION: "


@dataclass(frozen=True, slots=True)
class Note:
    """A note. level: `attention` where a reader must not overlook it. Its text form is what records hold."""

    text: str
    level: Level = "note"

    def __str__(self) -> str:
        return f"{ATTENTION}{self.text}" if self.is_urgent else self.text

    @property
    def is_urgent(self) -> bool:
        """Whether it must not be overlooked."""
        return self.level == "attention"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The note of a record's text."""
        return cls(text.removeprefix(ATTENTION), "attention") if text.startswith(ATTENTION) else cls(text)
