"""Initialisations that adapters of a library have in common, found once and stored once where that pays.

Adapters of one signature (names and shapes of modules) are clustered by the cosines of their A's. Where no seed explains a
cluster, the mean of its A's is what its members are coded against: it is quantised, at the width that makes file and members
smallest together, if that is smaller than members alone:

    bytes(w) = file(w) + n · forecast(member | mean in w bits)    <    n · forecast(member)

Files that a library has already stay as they are, and adapters that come later join them.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from bslora_convert.bslora.common import Common, commons_in, is_intact, read_common
from bslora_convert.coding.encode import encode
from bslora_convert.coding.forecast import Forecast
from bslora_convert.conversion.initial import against, common_of, in_file, modules_of, seed_of
from bslora_convert.errors import BsloraConvertError
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.fit.source import measure
from bslora_convert.initialisation.drawn import Module
from bslora_convert.initialisation.found import find
from bslora_convert.initialisation.initial import tensor_key
from bslora_convert.initialisation.kept import release
from bslora_convert.initialisation.siblings import clusters, mean, sketch
from bslora_convert.library.jobs import Job
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.reading import Reading
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.target import DEFAULT_ERROR

LEAST = 3  # adapters of a cluster
AVERAGED = 16  # adapters of which the mean is taken, at most
QUANTISED = (2, 3, 4, 5, 6, 8)  # bits a number of the mean


def commons_of(jobs: Sequence[Job], out: Path, recipe: Recipe, progress: Progress = silent) -> list[Path]:
    """The files that these adapters may be coded against, those that are made now among them."""
    init, begins = recipe.storage.init, recipe.storage.begins
    if init == "none" or isinstance(init, int) or not _is_coded(recipe):
        return []
    if begins is not None:
        start = load_lora(begins)
        return [] if seed_of(start) is not None else [common_of(start).write(out)]
    known = [path for path in commons_in(out) if is_intact(path)]
    there = [read_common(path) for path in known]
    groups: dict[tuple[str, ...], list[tuple[Job, Tensor]]] = defaultdict(list)
    here = [job for job in jobs if not job.item.is_remote]
    for done, job in enumerate(here if len(here) >= LEAST else ()):
        progress("comparing initialisations", done, len(here))
        with suppress(BsloraConvertError):  # what is wrong with an adapter is said when it is converted
            adapter = _load(job)
            if all(in_file(adapter, *file) is None for file in there):
                signature, numbers = sketch(modules_of(adapter))
                groups[signature].append((job, numbers))
    for group in groups.values():
        for members in clusters([numbers for _, numbers in group]):
            if len(members) >= LEAST:
                progress("looking for what initialisations have in common", words=f"{len(members)} alike")
                common = _worth_storing([group[index][0] for index in members], recipe)
                known += [] if common is None else [common.write(out)]
    return known


def _is_coded(recipe: Recipe) -> bool:
    return recipe.asked.chooses_precision or recipe.storage.bits is not None


def _load(job: Job) -> LoraAdapter:
    return load_lora(job.item.uri, **Reading.arguments_in(job.recipe))


def _worth_storing(jobs: Sequence[Job], recipe: Recipe) -> Common | None:
    """The file of what siblings have in common; None where a seed explains it, or where it would not pay."""
    some = [_load(job) for job in jobs[:: math.ceil(len(jobs) / AVERAGED)]]
    siblings = [modules_of(adapter) for adapter in some]
    average = mean(siblings)
    drawn = {name: Module(a, siblings[0][name].out) for name, a in average.items()}
    if find(drawn, thorough=recipe.storage.init == "search") is not None:
        return None
    with modules_over_cores():
        source = measure(some[0].modules, some[0].kinds)
    error = recipe.asked.max_error or DEFAULT_ERROR
    lost = error**2 / (1 + error**2) * source.energy
    least = len(jobs) * Forecast.of(source.spectra, source.shapes).bits_for(lost) / 8
    best: Common | None = None
    for width in QUANTISED:
        common = Common.of({tensor_key(name): encode(a, [width] * len(a)).coded for name, a in average.items()})
        known = in_file(some[0], common.name, common.shapes)
        source = replace(source, initial=None if known is None else known.initial)
        expected = Forecast.of(source.spectra, source.shapes, against(source)).bits_for(lost) / 8
        total = len(common.content) + len(jobs) * expected
        if total >= least:
            release(common.name)
            continue
        if best is not None:
            release(best.name)
        least, best = total, common
    return best
