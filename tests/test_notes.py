"""A note is one text in a record, and what is urgent stays so."""

import pytest

from bslora_convert.notes import Note


@pytest.mark.parametrize(
    "note", [Note("rows were cut"), Note("the answers differ", "attention"), Note("ATTENTION span")]
)
def test_a_note_is_read_back_from_its_text(note: Note) -> None:
    assert Note.parse(str(note)) == note


def test_an_urgent_note_is_marked() -> None:
    assert str(Note("look", "attention")) == "ATTENTION: look"
    assert not Note.parse("by the way").is_urgent
