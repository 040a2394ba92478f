"""What a compact adapter consists of before there are numbers: its modules, their ranks and who shares with whom.

The configuration holds a layout, every tensor's key and shape follow from it, and a group's pair stands under the module that
owns it: the first of the group's modules in natural order (layer 2 before layer 10). So a file can be checked against its
configuration, and a model can be prepared for it, before a single number is read.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from sys import intern
from typing import Any, cast

from bslora_convert.bslora.form import KINDS, LEVELS, BsloraForm
from bslora_convert.bslora.patterns import MOST, names_of, patterns
from bslora_convert.bslora.transforms import TRANSFORMS, Slice, Transform
from bslora_convert.errors import InputError
from bslora_convert.initialisation.initial import Initial
from bslora_convert.initialisation.kept import Origin, are_allowed
from bslora_convert.initialisation.stream import SEEDS, Place
from bslora_convert.modules.factors import Shape
from bslora_convert.modules.names import natural_order

LARGEST_SIDE = 1 << 24
AGAINST = ("local_A", "local_B")  # what may be stored against draws
MIX = "_mix"
LONGEST_NUMBER = 20  # digits
MODULE_FIELDS, GROUP_FIELDS = ("shape", "rank", "kind", "initial", *LEVELS), ("rank", "kernel_rank")


@dataclass(frozen=True, slots=True)
class Entry:
    """One adapted module: shape (out, in), local rank, and its group on each level that it shares on.

    initial: where what its local A (and B) are stored against stands, by tensor (`local_A`).
    """

    shape: Shape
    rank: int
    groups: Mapping[str, str] = field(default_factory=dict)
    kind: str = "linear"
    initial: Mapping[str, Place] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Group:
    """One shared pair: its rank, and the rank of its members' kernels (as far as their grids allow)."""

    rank: int
    kernel_rank: int = 1


@dataclass(frozen=True)
class Layout:
    """The whole adapter; `shared[level][group]`.

    origin: of the draws of modules that are stored against their random initialisation; None where none is.
    """

    transform: Transform | None
    modules: Mapping[str, Entry]
    shared: Mapping[str, Mapping[str, Group]]
    origin: Origin | None = None

    @classmethod
    def of(cls, form: BsloraForm, initial: Initial | None = None) -> "Layout":
        """The layout of a form. initial: the random initialisation that its codes are against, if any."""
        places: Mapping[str, Place] = {} if initial is None else initial.places

        def against(name: str) -> dict[str, Place]:
            return {own: places[f"{name}.bslora_{own}"] for own in AGAINST if f"{name}.bslora_{own}" in places}

        entries = {
            name: Entry(
                m.shape, m.local.rank, {level: path.group for level, path in m.paths.items()}, m.kind, against(name)
            )
            for name, m in sorted(form.modules.items(), key=lambda item: natural_order(item[0]))
        }
        shared = {
            level: {group: Group(pair.rank, _kernel_rank(form, level, group)) for group, pair in groups.items()}
            for level, groups in form.shared.items()
        }
        return cls(form.transform, entries, shared, None if initial is None else initial.origin)

    @classmethod
    def parse(cls, config: Mapping[str, Any], where: object) -> "Layout":
        """The layout that a configuration describes.

        :raises InputError: naming `where` and the field.
        """
        transform = _parse_transform(config.get("transform"), where)
        shared = _parse_shared(config.get("shared", {}), where)
        said = config.get("modules")
        if not isinstance(said, dict) or not said:
            raise InputError(f"{where}: modules is empty or not an object")
        modules = _by_name(said, MODULE_FIELDS, f"{where}: modules")
        entries = {
            intern(name): _parse_entry(modules[name], transform, shared, f"{where}: modules[{name}]")
            for name in sorted(modules, key=natural_order)
        }
        used = {(level, group) for entry in entries.values() for level, group in entry.groups.items()}
        for level, groups in shared.items():
            for group in groups:
                if (level, group) not in used:
                    raise InputError(f"{where}: shared.{level}[{group}] has no module")
        return cls(transform, entries, shared, _parse_origin(config.get("initialisation"), entries, where))

    def renamed(self, names: Mapping[str, str]) -> "Layout":
        """The same under other names of its modules."""
        return replace(self, modules={names[name]: entry for name, entry in self.modules.items()})

    @property
    def initial(self) -> dict[str, Place]:
        """Where what tensors are stored against stands, by key."""
        return {
            f"{name}.bslora_{own}": place
            for name, entry in self.modules.items()
            for own, place in entry.initial.items()
        }

    @property
    def initial_lengths(self) -> dict[str, int]:
        """Numbers of a vector of these tensors."""
        sides = {"local_A": 1, "local_B": 0}
        return {
            f"{name}.bslora_{own}": entry.shape[sides[own]]
            for name, entry in self.modules.items()
            for own in entry.initial
        }

    def to_config(self) -> dict[str, Any]:
        """The fields of the configuration that `parse` reads."""
        return {
            **({} if self.origin is None else {"initialisation": _origin_to_dict(self.origin)}),
            "transform": transform_to_dict(self.transform),
            "shared": {
                level: {
                    pattern: {
                        key: _column([getattr(groups[name], key) for name in names])
                        for key in ("rank", "kernel_rank")
                        if self._says(key)
                    }
                    for pattern, names in patterns(groups).items()
                }
                for level, groups in self.shared.items()
            },
            "modules": _modules_to_dict(self.modules),
        }

    def _says(self, setting: str) -> bool:
        return setting == "rank" or "A" in (self.transform.own_names if self.transform else ())

    @cached_property
    def owners(self) -> dict[tuple[str, str], str]:
        """The module that owns each group's pair, by (level, group)."""
        owners: dict[tuple[str, str], str] = {}
        for name in sorted(self.modules, key=natural_order):
            for level, group in self.modules[name].groups.items():
                owners.setdefault((level, group), name)
        return owners

    def held_by(self, name: str) -> dict[str, Shape]:
        """Shapes of what stands under a module: local_A (r, in), local_B (out, r), kernels or gates, and the pairs it owns."""
        entry = self.modules[name]
        shapes: dict[str, Shape] = {
            "local_A": (entry.rank, entry.shape[1]),
            "local_B": (entry.shape[0], entry.rank),
        }
        for level, group in entry.groups.items():
            assert self.transform is not None  # a group exists only beside a transform
            shared = self.shared[level][group]
            if self.owners[level, group] == name:
                rows, columns = self.transform.pair_sizes
                shapes |= {f"{level}_A": (shared.rank, columns), f"{level}_B": (rows, shared.rank)}
            own = self.transform.own_shapes(entry.shape, shared.kernel_rank)
            shapes |= {f"{level}_own_{key}": shape for key, shape in own.items()}
        return shapes

    def stored_by(self, name: str) -> dict[str, Shape]:
        """Shapes of what is stored under a module: what it holds, with `<tensor>_mix` (r, r₀) before what is against draws."""
        entry = self.modules[name]
        shapes: dict[str, Shape] = {}
        for tensor, shape in self.held_by(name).items():
            if tensor in entry.initial:
                shapes[f"{tensor}{MIX}"] = entry.rank, entry.initial[tensor].rank
            shapes[tensor] = shape
        return shapes

    def stored(self) -> Iterator[tuple[str, Shape]]:
        """Every stored tensor's key, without PEFT's prefix, and its shape."""
        for name in self.modules:
            for tensor, shape in self.stored_by(name).items():
                yield f"{name}.bslora_{tensor}", shape


def _modules_to_dict(modules: Mapping[str, Entry]) -> dict[str, dict[str, Any]]:
    """Entries by pattern: modules of one shape together, with what is not the same for all of them as a list in one text."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for name, entry in modules.items():
        initial = tuple((key, place.rank) for key, place in entry.initial.items())
        alike.setdefault((entry.shape, entry.kind, initial, tuple(entry.groups)), []).append(name)
    found: dict[str, dict[str, Any]] = {}
    for (shape, kind, initial, levels), names in alike.items():
        for pattern, members in patterns(names).items():
            entries = [modules[name] for name in members]
            found[pattern] = {
                "shape": list(shape),
                "rank": _column([entry.rank for entry in entries]),
                **({"kind": kind} if kind != "linear" else {}),
                **({"initial": _places_to_dict(entries)} if initial else {}),
                **{level: _named([entry.groups[level] for entry in entries]) for level in levels},
            }
    return dict(sorted(found.items(), key=lambda item: natural_order(item[0])))


def _places_to_dict(entries: Sequence[Entry]) -> dict[str, Any]:
    return {
        key[-1]: [_column([entry.initial[key].first for entry in entries]), place.rank]
        for key, place in entries[0].initial.items()
    }


def _column(numbers: Sequence[int]) -> int | str:
    """What each of several modules has: the number itself where it is one for all, else all of them, in order, in one text."""
    return numbers[0] if len(set(numbers)) == 1 else " ".join(map(str, numbers))


def _named(groups: Sequence[str]) -> str | list[str]:
    """The group of each of several modules: one name, a pattern that stands for all of them in order, or a list."""
    if len(set(groups)) == 1:
        return groups[0]
    ((pattern, names), *others) = patterns(groups).items()
    return pattern if not others and names == groups else list(groups)


def _by_name(by_pattern: Mapping[str, Any], known: Collection[str], where: str) -> dict[str, Any]:
    """What stands there of each name, by pattern; what is no object is left as it is, for its reader to refuse.

    :raises InputError: for a field that is not known, and as `names_of`.
    """
    found: dict[str, Any] = {}
    for pattern, said in by_pattern.items():
        here = f"{where}[{pattern}]"
        names = names_of(pattern, MOST - len(found), where)
        columns = said if isinstance(said, dict) else {}
        if unknown := set(columns) - set(known):
            raise InputError(f"{here} has {min(unknown)[:60]!r}, which is not known")
        columns = {key: _spread(key, one, len(names), f"{here}.{key}") for key, one in columns.items()}
        for index, name in enumerate(names):
            if name in found:
                raise InputError(f"{where}: {name} stands there twice")
            found[name] = {key: column[index] for key, column in columns.items()} if isinstance(said, dict) else said
    return found


def _spread(key: str, value: Any, count: int, where: str) -> Sequence[Any]:
    """What a field says of each of the modules of a pattern."""
    if key == "initial" and isinstance(value, dict):
        sides = {
            side: [[first, place[1]] for first in _spread("first", place[0], count, f"{where}.{side}")]
            if isinstance(place, list) and len(place) == 2
            else [place] * count
            for side, place in value.items()
        }
        return [{side: places[index] for side, places in sides.items()} for index in range(count)]
    words = [value] * count
    if key in LEVELS and isinstance(value, list):
        words = value
    elif isinstance(value, str) and key in LEVELS and "{" in value:
        words = names_of(value, count, where)
    elif isinstance(value, str) and key not in (*LEVELS, "kind"):
        words = _numbers(value, where)
    if len(words) != count:
        raise InputError(f"{where} says {len(words)} things of {count} modules")
    return words


def _numbers(text: str, where: str) -> list[int]:
    words = text.split(" ")
    if not all(word.isascii() and word.isdecimal() and len(word) <= LONGEST_NUMBER for word in words):
        raise InputError(f"{where} is {text[:60]!r}, whole numbers are expected")
    return [int(word) for word in words]


def transform_to_dict(transform: Transform | None) -> dict[str, Any]:
    """The transform's name and settings."""
    if transform is None:
        return {"name": "none"}
    return {"name": transform.name, **asdict(cast(Any, transform))}


def _kernel_rank(form: BsloraForm, level: str, group: str) -> int:
    """The largest kernel rank among a group's modules; one where the transform has no kernels."""
    paths = [m.paths[level] for m in form.modules.values() if level in m.paths and m.paths[level].group == group]
    return max((path.own["A"].shape[0] for path in paths if "A" in path.own), default=1)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < LARGEST_SIDE


def _parse_transform(value: Any, where: object) -> Transform | None:
    if not isinstance(value, dict) or value.get("name") not in ("none", *TRANSFORMS):
        raise InputError(f"{where}: transform is {value!r}, a name of none, {', '.join(TRANSFORMS)} is expected")
    if value["name"] == "none":
        return None
    settings = {key: setting for key, setting in value.items() if key != "name"}
    for key, setting in settings.items():
        if key.startswith("size") and not (_is_whole(setting) and setting > 0):
            raise InputError(f"{where}: transform.{key} is {setting!r}, a positive whole number is expected")
    kind: Any = TRANSFORMS[value["name"]]
    try:
        transform: Transform = kind(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: transform: {error}") from None
    return transform


def _parse_shared(value: Any, where: object) -> dict[str, dict[str, Group]]:
    if not isinstance(value, dict) or not all(isinstance(groups, dict) for groups in value.values()):
        raise InputError(f"{where}: shared is not an object of levels, each an object of groups")
    shared: dict[str, dict[str, Group]] = {}
    for level, groups in value.items():
        if level not in LEVELS:
            raise InputError(f"{where}: shared.{level}: one of {', '.join(LEVELS)} is expected")
        for name, group in _by_name(groups, GROUP_FIELDS, f"{where}: shared.{level}").items():
            if not isinstance(group, dict) or not group:
                raise InputError(f"{where}: shared.{level}[{name}] is {group!r}, an object with a rank is expected")
            for key in group:
                if not _is_whole(group[key]) or group[key] < 1:
                    raise InputError(
                        f"{where}: shared.{level}[{name}].{key} is {group[key]!r}, a positive whole number is expected"
                    )
            if "rank" not in group:
                raise InputError(f"{where}: shared.{level}[{name}] has no rank")
            shared.setdefault(level, {})[name] = Group(**group)
    return shared


def _parse_entry(
    value: Any, transform: Transform | None, shared: Mapping[str, Mapping[str, Group]], where: str
) -> Entry:
    if not isinstance(value, dict) or not isinstance(value.get("shape"), list):
        raise InputError(f"{where}: an object with a shape is expected")
    shape = value["shape"]
    if len(shape) != 2 or not all(_is_whole(side) and side > 0 for side in shape):
        raise InputError(f"{where}: shape is {shape!r}, two positive whole numbers are expected")
    if not _is_whole(value.get("rank")):
        raise InputError(f"{where}: rank is {value.get('rank')!r}, a whole number is expected")
    kind = value.get("kind", "linear")
    if kind not in KINDS:
        raise InputError(f"{where}: kind is {kind!r}, one of {', '.join(KINDS)} is expected")
    if isinstance(transform, Slice) and (shape[0] > transform.size_out or shape[1] > transform.size_in):
        raise InputError(f"{where}: shape {shape} is larger than the shared factors it would be a window of")
    groups = {level: value[level] for level in LEVELS if level in value}
    if groups and transform is None:
        raise InputError(f"{where}: shares with a group although the transform is none")
    for level, group in groups.items():
        if not isinstance(group, str) or group not in shared.get(level, {}):
            raise InputError(f"{where}: {level} is {group!r}, the name of a group in shared.{level} is expected")
    initial = _parse_initial(value["initial"], kind, where) if "initial" in value else {}
    return _entry((shape[0], shape[1]), value["rank"], tuple(groups.items()), kind, tuple(initial.items()))


@lru_cache(1 << 12)
def _entry(
    shape: Shape, rank: int, groups: tuple[tuple[str, str], ...], kind: str, initial: tuple[tuple[str, Place], ...]
) -> Entry:
    """One object for all modules that are alike, in a thousand adapters on one model."""
    return Entry(shape, rank, dict(groups), kind, dict(initial))


def _parse_initial(value: Any, kind: str, where: str) -> dict[str, Place]:
    if kind != "linear":
        raise InputError(f"{where}: initial is given for an {kind}, which is stored against nothing")
    if not isinstance(value, dict) or not value or not set(value) <= {"A", "B"}:
        raise InputError(f"{where}: initial is {value!r}, an object of A and B is expected")
    for one in value.values():
        whole = isinstance(one, list) and len(one) == 2 and all(type(number) is int and number >= 0 for number in one)
        if not whole or not 0 < one[1] < LARGEST_SIDE:
            raise InputError(f"{where}: initial is {value!r}, a first draw and a rank are expected")
    return {own: Place(*value[own[-1]]) for own in AGAINST if own[-1] in value}


def _origin_to_dict(origin: Origin) -> dict[str, Any]:
    return {name: value for name, value in asdict(origin).items() if value is not None}


def _parse_origin(value: Any, entries: Mapping[str, Entry], where: object) -> Origin | None:
    placed = [
        (AGAINST.index(key), place, entry.shape) for entry in entries.values() for key, place in entry.initial.items()
    ]
    places = [(place, shape) for _, place, shape in placed]
    if value is None and not places:
        return None
    known = isinstance(value, dict) and set(value) in ({"seed", "checksum"}, {"file", "checksum"})
    if not known or not all(
        isinstance(one, str) if name == "file" else type(one) is int and 0 <= one < SEEDS for name, one in value.items()
    ):
        raise InputError(
            f"{where}: initialisation is {value!r}, an object with seed or file, and checksum, is expected"
        )
    if not places:
        raise InputError(f"{where}: initialisation is given, but no module has a place in it")
    spans = sorted({(p.first, p.first + p.rank * shape[1 - at]) for at, p, shape in placed})
    if any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        raise InputError(f"{where}: modules[…].initial has places that overlap; the adapter is damaged")
    if not are_allowed(*zip(*places, strict=True)):
        raise InputError(f"{where}: no adapter of these shapes has draws so far on as modules[…].initial says")
    return Origin(**value)
