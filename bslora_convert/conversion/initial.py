"""A's random initialisation of a LoRA, looked for as its recipe says, and what a record says of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bslora_convert.bslora.common import read_common
from bslora_convert.coding.forecast import Forecast
from bslora_convert.coding.items import Against
from bslora_convert.errors import RecipeError
from bslora_convert.fit.source import Source
from bslora_convert.initialisation.drawn import Module
from bslora_convert.initialisation.found import Found, find
from bslora_convert.initialisation.initial import Initial
from bslora_convert.initialisation.kept import are_allowed
from bslora_convert.initialisation.siblings import in_common
from bslora_convert.lora import LoraAdapter
from bslora_convert.process.progress import Progress, silent
from bslora_convert.results.adapter import InitialisationRecord

SEEDED, SIBLINGS = "mt19937", "siblings"


@dataclass(frozen=True, slots=True)
class Known:
    """An initialisation that was found in an adapter.

    cosines: of A and its draws, by module. offset: draws of the seed before the adapter's own; None where there is no seed.
    """

    initial: Initial
    cosines: Mapping[str, float]
    offset: int | None = None


def modules_of(adapter: LoraAdapter) -> dict[str, Module]:
    """The adapter's A's, as a search takes them."""
    return {
        name: Module(module.a, module.shape[0], "embedding" if module.kind == "embedding" else "linear")
        for name, module in adapter.modules.items()
    }


def look_for(
    adapter: LoraAdapter, asked: int | str, commons: Sequence[Path] = (), progress: Progress = silent
) -> Known | None:
    """The adapter's initialisation: a seed's, else one that it has in common with others of its library.

    asked: as of the recipe's `init`. commons: files of initialisations of the library (`bslora.common`).

    :raises RecipeError: when a seed was given and its draws are not found in the adapter.
    """
    if asked == "none":
        return None
    modules, seed = modules_of(adapter), asked if isinstance(asked, int) else None
    found = find(modules, seed=seed, thorough=asked == "search", progress=progress)
    if found is not None and are_allowed(found.places, {n: adapter.modules[n].shape for n in found.places}):
        return _seeded(found, modules)
    if seed is not None:
        raise RecipeError(
            f"init is {seed}: no A of {adapter.weights} was drawn from this seed, as far as its stream was searched; give "
            "auto, search or none",
            "init",
        )
    for path in commons:
        name, shapes = read_common(path)
        places, cosines = in_common(modules, name, shapes)
        if places:
            return Known(Initial.at(name, places, {n: modules[n].width for n in places}), cosines)
    return None


def _seeded(found: Found, modules: Mapping[str, Module]) -> Known:
    initial = Initial.at(found.seed, found.places, {name: modules[name].width for name in found.places})
    return Known(initial, found.cosines, found.offset)


def against(source: Source) -> dict[str, Against]:
    """Every module's components against its initialisation, where that is known."""
    known: dict[str, Against] = {}
    for name, svd in source.svds.items():
        base = None if source.initial is None else source.initial.base(name)
        if base is not None and len(svd.energies):
            vectors = svd.truncate([source.deltas[name].factors()], len(svd.energies)).a
            known[name] = Against.of(vectors, base, source.metric(name).right)
    return known


def describe(known: Known, adapter: LoraAdapter) -> InitialisationRecord:
    """What a record says of an initialisation."""
    changed = {name: 1 - cosine**2 for name, cosine in known.cosines.items()}
    energies = {name: float(adapter.modules[name].a.double().square().sum()) for name in changed}
    total, origin = sum(energies.values()), known.initial.origin
    return InitialisationRecord(
        generator=SEEDED if origin.file is None else SIBLINGS,
        seed=origin.seed,
        offset=known.offset,
        file=origin.file,
        modules=len(changed),
        cosine=sum(known.cosines.values()) / len(changed),
        changed=sum(changed[name] * energies[name] for name in changed) / total if total else 0.0,
        changed_by_module=changed,
    )


def bytes_without(source: Source, lost: float) -> int:
    """Bytes of codes that would lose the energy `lost` if the initialisation were not known."""
    expected = Forecast.of(source.plain.spectra, source.shapes)
    return math.ceil(expected.bits_for(lost / (1 + lost / source.energy)) / 8) if source.energy else 0
