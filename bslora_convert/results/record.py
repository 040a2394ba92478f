"""A record: a frozen dataclass whose fields are the keys of a JSON object, in order."""

from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from types import UnionType
from typing import Any, Self, TypeVar, dataclass_transform, get_args, get_origin, get_type_hints

from bslora_convert.errors import InputError

Kind = TypeVar("Kind")
Files = dict[str, dict[str, Any]]  # of a directory, by path in it: bytes and sha256


@dataclass_transform(frozen_default=True, kw_only_default=True)
def record(kind: type[Kind]) -> type[Kind]:
    """Makes a class a record's dataclass; a field with the default None is a key that is left out where it is None."""
    return dataclass(frozen=True, kw_only=True, slots=True, eq=False)(kind)


class Record:
    """Fields by attribute, and by JSON name as a dictionary has them; equal to the dictionary that it is written as."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {name: _plain(self[name]) for name in self}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The record that `to_dict` wrote.

        :raises InputError: naming a key that is missing, unknown or of another shape.
        """
        kinds = _kinds(cls)  # type: ignore[arg-type]
        required = {one.name for one in fields(cls) if one.default is MISSING}  # type: ignore[arg-type]
        for name in sorted(set(values) - set(kinds) | required - set(values)):
            raise InputError(f"{cls.__name__}: the key {name} is {'missing' if name in kinds else 'unknown'}")
        return cls(**{name: _built(kinds[name], value, name) for name, value in values.items()})

    def __getitem__(self, name: str) -> Any:
        if name not in self:
            raise KeyError(name)
        return getattr(self, name)

    def get(self, name: str, default: Any = None) -> Any:
        """A value by its JSON name."""
        return getattr(self, name) if name in self else default

    def keys(self) -> list[str]:
        """The JSON names."""
        return list(self)

    def __iter__(self) -> Iterator[str]:
        for one in fields(self):  # type: ignore[arg-type]
            if one.default is MISSING or getattr(self, one.name) is not None:
                yield one.name

    def __contains__(self, name: object) -> bool:
        return name in list(self)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record | Mapping):
            return NotImplemented
        return self.to_dict() == (other.to_dict() if isinstance(other, Record) else other)

    __hash__ = None  # type: ignore[assignment]


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


@cache
def _kinds(kind: Any) -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if not name.startswith("_")}


def _built(kind: Any, value: Any, name: str) -> Any:
    """A value with the records that its type names."""
    if isinstance(kind, UnionType):
        kind = next((one for one in get_args(kind) if one is not type(None)), Any)
    if value is None:
        return None
    inner = get_args(kind)[-1] if get_args(kind) else kind
    if not (isinstance(inner, type) and issubclass(inner, Record)):
        return value
    shape = get_origin(kind)
    if shape is list and isinstance(value, list):
        return [inner.from_dict(one) for one in value]
    if shape is not list and isinstance(value, Mapping):
        return {key: inner.from_dict(one) for key, one in value.items()} if shape is dict else inner.from_dict(value)
    raise InputError(f"{name} is {type(value).__name__}: another shape is expected")
