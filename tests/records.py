"""Records of which a test says only what it is about."""

from dataclasses import MISSING, fields
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from bslora_convert.results.record import Record

Kind = TypeVar("Kind", bound=Record)
EMPTY = {int: 0, float: 0.0, str: "", bool: False, list: [], dict: {}}


def blank(kind: type[Kind], **given: Any) -> Kind:
    """A record with the values given, dictionaries for records within it, and nothing in the rest."""
    hints = get_type_hints(kind)
    values = {}
    for one in fields(kind):  # type: ignore[arg-type]
        if one.name in given:
            values[one.name] = _built(hints[one.name], given[one.name])
        elif one.default is MISSING:
            values[one.name] = _nothing(hints[one.name])
    return kind(**values)


def _nothing(hint: Any) -> Any:
    if isinstance(hint, UnionType):
        return None
    return blank(hint) if isinstance(hint, type) and issubclass(hint, Record) else EMPTY[get_origin(hint) or hint]


def _built(hint: Any, value: Any) -> Any:
    if isinstance(hint, UnionType):
        hint = next(one for one in get_args(hint) if one is not type(None))
    inner = get_args(hint)[-1] if get_args(hint) else hint
    if value is None or isinstance(value, Record) or not (isinstance(inner, type) and issubclass(inner, Record)):
        return value
    if isinstance(value, list):
        return [_built(inner, one) for one in value]
    return (
        {name: _built(inner, one) for name, one in value.items()} if get_origin(hint) is dict else blank(inner, **value)
    )
