"""A's random initialisation of a LoRA, looked for as its recipe says, and what a record says of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bslora_convert.coding.forecast import Forecast
from bslora_convert.coding.items import Against
from bslora_convert.errors import RecipeError
from bslora_convert.fit.source import Source
from bslora_convert.initialisation.drawn import Module
from bslora_convert.initialisation.found import Found, find
from bslora_convert.initialisation.initial import Initial
from bslora_convert.initialisation.kept import are_allowed
from bslora_convert.lora import LoraAdapter
from bslora_convert.process.progress import Progress, silent
from bslora_convert.results.adapter import InitialisationRecord

GENERATOR = "mt19937"


def look_for(
    adapter: LoraAdapter, asked: int | str, before: Sequence[Found] = (), progress: Progress = silent
) -> Found | None:
    """Where the adapter's A's were drawn, if that is found. asked: as of the recipe's `init`. before: finds of other adapters.

    :raises RecipeError: when a seed was given and its draws are not found in the adapter.
    """
    if asked == "none":
        return None
    modules = {
        name: Module(module.a, module.shape[0], "embedding" if module.kind == "embedding" else "linear")
        for name, module in adapter.modules.items()
    }
    seed = asked if isinstance(asked, int) else None
    found = find(modules, seed=seed, thorough=asked == "search", before=before, progress=progress)
    if found is not None and not are_allowed(
        found.places, {name: adapter.modules[name].shape for name in found.places}
    ):
        found = None  # what no reader would take
    if found is None and seed is not None:
        raise RecipeError(
            f"init is {seed}: no A of {adapter.weights} was drawn from this seed, as far as its stream was searched; give "
            "auto, search or none",
            "init",
        )
    return found


def initial_of(found: Found | None, adapter: LoraAdapter) -> Initial | None:
    """The draws of what was found."""
    if found is None:
        return None
    return Initial.of_seed(found.seed, found.places, {n: adapter.modules[n].shape[1] for n in found.places})


def against(source: Source) -> dict[str, Against]:
    """Every module's components against its initialisation, where that is known."""
    if source.initial is None:
        return {}
    known: dict[str, Against] = {}
    for name, svd in source.svds.items():
        base = source.initial.base(name)
        if base is not None and len(svd.energies):
            vectors = svd.truncate([source.deltas[name].factors()], len(svd.energies)).a
            known[name] = Against.of(vectors, base, source.metric(name).right)
    return known


@dataclass(frozen=True, slots=True)
class Changed:
    """How much of A training changed: 1 − cos² of A and its draws, by module and over all of them by energy."""

    modules: Mapping[str, float]
    share: float

    @classmethod
    def of(cls, found: Found, adapter: LoraAdapter) -> "Changed":
        """That of the modules whose draws were found."""
        shares = {name: 1 - cosine**2 for name, cosine in found.cosines.items()}
        energies = {name: float(adapter.modules[name].a.double().square().sum()) for name in shares}
        total = sum(energies.values())
        return cls(shares, sum(shares[name] * energies[name] for name in shares) / total if total else 0.0)


def describe(found: Found, adapter: LoraAdapter) -> InitialisationRecord:
    """What a record says of a find."""
    changed = Changed.of(found, adapter)
    return InitialisationRecord(
        generator=GENERATOR,
        seed=found.seed,
        offset=found.offset,
        modules=len(found.places),
        cosine=found.cosine,
        changed=changed.share,
        changed_by_module=dict(changed.modules),
    )


def bytes_without(source: Source, lost: float) -> int:
    """Bytes of codes that would lose the energy `lost` if the initialisation were not known."""
    expected = Forecast.of(source.plain.spectra, source.shapes)
    return math.ceil(expected.bits_for(lost / (1 + lost / source.energy)) / 8) if source.energy else 0
