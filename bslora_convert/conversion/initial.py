"""A's random initialisation of a LoRA, looked for as its recipe says, and what a record says of it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from bslora_convert.bslora.common import Common, read_common
from bslora_convert.coding.components import known_sides
from bslora_convert.coding.encode import encode
from bslora_convert.coding.forecast import Forecast, Sides
from bslora_convert.errors import RecipeError
from bslora_convert.files.address import resolve
from bslora_convert.files.record import EXPANSION_NAME
from bslora_convert.fit.source import Source
from bslora_convert.initialisation.drawn import Module
from bslora_convert.initialisation.found import Found, find
from bslora_convert.initialisation.initial import Initial, tensor_key
from bslora_convert.initialisation.kept import Key, are_allowed
from bslora_convert.initialisation.match import bar, cosine
from bslora_convert.initialisation.siblings import in_common
from bslora_convert.initialisation.stream import Place
from bslora_convert.initialisation.tape import Tape
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.modules.factors import Shape
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.storage import INITS, began_from
from bslora_convert.results.adapter import InitialisationRecord

OF_SEED, OF_ADAPTERS = "mt19937", "adapters"
OF_START = 8  # bits of a number of an adapter that training went on from


@dataclass(frozen=True, slots=True)
class Known:
    """An initialisation that was found in an adapter.

    cosines: of A and its draws, by module. offset: draws of the seed before the adapter's own; None where there is no seed.
    common: the file that holds the draws, where it is to be written beside the result.
    """

    initial: Initial
    cosines: Mapping[str, float]
    offset: int | None = None
    common: Common | None = None


def check_init(asked: int | str) -> None:
    """:raises RecipeError: for an adapter that is not there."""
    began = began_from(asked)
    if began is not None and not resolve(began).exists():
        raise RecipeError(
            f"init is {asked!r}: {', '.join(INITS)}, a seed, or the directory of an adapter that is there is allowed",
            "init",
        )


def modules_of(adapter: LoraAdapter) -> dict[str, Module]:
    """The adapter's A's, as a search takes them."""
    return {
        name: Module(module.a, module.shape[0], "embedding" if module.kind == "embedding" else "linear")
        for name, module in adapter.modules.items()
    }


def vectors_of(adapter: LoraAdapter) -> dict[str, Tensor]:
    """Rows of A and columns of B of linear modules, by the keys that the form has for them."""
    linear = {name: module for name, module in adapter.modules.items() if module.kind == "linear"}
    of_a = {tensor_key(name): module.a for name, module in linear.items()}
    return of_a | {tensor_key(name, "B"): module.b.T for name, module in linear.items()}


def look_for(
    adapter: LoraAdapter, asked: int | str, commons: Sequence[Path] | None = None, progress: Progress = silent
) -> Known | None:
    """The adapter's initialisation: a seed's, else one that it has in common with others of its library.

    asked: as of the recipe's `init`. commons: files of initialisations of the library (`bslora.common`), where the adapter is of
    one; adapters that did not go on from the one that was given are let be then.

    :raises RecipeError: when a seed, or an adapter that training went on from, was given and nothing of it is found.
    :raises InputError: when that adapter can't be read.
    """
    if asked == "none":
        return None
    modules, seed = modules_of(adapter), asked if isinstance(asked, int) else None
    began = began_from(asked)
    if began is not None and commons is None:
        return _continued(adapter, began)
    recorded = _recorded(adapter)
    if recorded is not None and seed in (None, recorded.initial.key):
        return recorded
    found = find(modules, seed=seed, thorough=asked == "search", progress=progress) if began is None else None
    if found is not None and are_allowed(found.places.values(), [adapter.modules[n].shape for n in found.places]):
        return _seeded(found, modules)
    if seed is not None:
        raise RecipeError(
            f"init is {seed}: no A of {adapter.weights} was drawn from this seed, as far as its stream was searched; give "
            "auto, search or none",
            "init",
        )
    alike = [known for path in commons or () if (known := in_file(adapter, *read_common(path))) is not None]
    return max(alike, key=lambda known: sum(known.cosines.values()), default=None)


def _continued(adapter: LoraAdapter, began: str) -> Known:
    """What training began with, a step-0 checkpoint or an adapter: its seed where that says all, else its own numbers."""
    start = load_lora(began)
    found = seed_of(start)
    if found is not None:
        again = find(modules_of(adapter), seed=found.seed, before=[found])
        if again is not None:
            return _seeded(again, modules_of(adapter))
    common = common_of(start)
    known = in_file(adapter, common.name, common.shapes)
    if known is None:
        raise RecipeError(f"init is {began!r}: no module of {adapter.weights} is like its; give auto or none", "init")
    return replace(known, common=common)


def seed_of(start: LoraAdapter) -> Found | None:
    """The seed of a checkpoint of step 0; None of an adapter whose B says something as well."""
    return None if any(bool(module.b.any()) for module in start.modules.values()) else find(modules_of(start))


def common_of(start: LoraAdapter) -> Common:
    """The file of what an adapter began with, precise enough to be it."""
    told = {key: one for key, one in vectors_of(start).items() if bool(one.any())}  # a B that is zero says nothing
    return Common.of({key: encode(one, [OF_START] * len(one)).coded for key, one in told.items()})


def in_file(adapter: LoraAdapter, name: str, shapes: Mapping[str, Shape]) -> Known | None:
    """What an adapter has in common with a file; None where that is nothing."""
    vectors = vectors_of(adapter)
    places, cosines = in_common(vectors, name, shapes)
    of_a = {key.rpartition(".bslora_")[0]: cosine for key, cosine in cosines.items() if key.endswith("_A")}
    if not of_a:
        return None
    return Known(Initial.at(name, places, {key: vectors[key].shape[1] for key in places}), of_a)


def _recorded(adapter: LoraAdapter) -> Known | None:
    """The draws that an adapter was trained from, where its record says so (`peft.Init`) and its A's agree."""
    linear = {name for name, module in adapter.modules.items() if module.kind == "linear"}
    try:
        said = json.loads((adapter.weights.parent / EXPANSION_NAME).read_bytes())["drawn"]
        places = {name: Place(first, rank) for name, (first, rank) in said["places"].items() if name in linear}
        seed, numbers = said["seed"], [number for place in places.values() for number in astuple(place)]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    if not places or not all(type(number) is int and number >= 0 for number in (seed, *numbers)):
        return None
    shapes = {name: adapter.modules[name].shape for name in places}
    if not all(0 < place.rank <= adapter.modules[name].rank for name, place in places.items()):
        return None
    if not are_allowed(places.values(), [shapes[name] for name in places]):
        return None
    tape = Tape(seed)
    rows = {name: adapter.modules[name].a[: place.rank] for name, place in places.items()}
    cosines = {name: cosine(rows[name], place.first, tape) for name, place in places.items()}
    alike = {name: found for name, found in cosines.items() if found >= bar(rows[name].numel())}
    if not alike:
        return None
    return Known(_of_a(seed, {n: places[n] for n in alike}, {n: shapes[n][1] for n in alike}), alike, 0)


def _seeded(found: Found, modules: Mapping[str, Module]) -> Known:
    return Known(
        _of_a(found.seed, found.places, {n: modules[n].width for n in found.places}), found.cosines, found.offset
    )


def _of_a(key: Key, places: Mapping[str, Place], widths: Mapping[str, int]) -> Initial:
    """The draws of modules' A's."""
    of_a = {name: tensor_key(name) for name in places}
    return Initial.at(key, {of_a[n]: place for n, place in places.items()}, {of_a[n]: widths[n] for n in places})


def against(source: Source) -> dict[str, Sides]:
    """What every module's components are against, where that is known."""
    if source.initial is None:
        return {}

    def sides(name: str) -> Sides:
        svd = source.svds[name]
        made = cache(lambda: svd.truncate([source.deltas[name].factors()], len(svd.energies)))
        return known_sides(source, name, made)

    return {name: sides(name) for name in source.initial.modules if len(source.svds[name].energies)}


def describe(known: Known, adapter: LoraAdapter) -> InitialisationRecord:
    """What a record says of an initialisation."""
    changed = {name: 1 - cosine**2 for name, cosine in known.cosines.items()}
    energies = {name: float(adapter.modules[name].a.double().square().sum()) for name in changed}
    total, origin = sum(energies.values()), known.initial.origin
    return InitialisationRecord(
        generator=OF_SEED if origin.file is None else OF_ADAPTERS,
        seed=origin.seed,
        offset=known.offset,
        file=origin.file,
        modules=len(changed),
        cosine=sum(known.cosines.values()) / len(changed),
        changed=sum(changed[name] * energies[name] for name in changed) / total if total else 0.0,
        changed_by_module=changed,
    )


def recalled(record: Mapping[str, Any], initial: Initial | None) -> Known | None:
    """What was found when an adapter was converted that has this initialisation, by its record; None where that says nothing."""
    said = record.get("initialisation")
    if initial is None or not isinstance(said, dict):
        return None
    found = InitialisationRecord.from_dict(said)
    cosines = {name: math.sqrt(1 - changed) for name, changed in found.changed_by_module.items()}
    return Known(initial, cosines, found.offset)


def bytes_without(source: Source, lost: float) -> int:
    """Bytes of codes that would lose the energy `lost` if the initialisation were not known."""
    expected = Forecast.of(source.plain.spectra, source.shapes)
    return math.ceil(expected.bits_for(lost / (1 + lost / source.energy)) / 8) if source.energy else 0
