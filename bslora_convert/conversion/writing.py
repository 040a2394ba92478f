"""A compact directory as it lands: written, read back, measured, and described by what was measured."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from bslora_convert.bslora.storage import CONFIG_NAME, WEIGHTS_NAME, CompactAdapter, load_compact, save_compact
from bslora_convert.conversion import fidelity
from bslora_convert.conversion.initial import Known, bytes_without, describe
from bslora_convert.conversion.request import Converted
from bslora_convert.files.card import carried
from bslora_convert.files.hashing import sha256
from bslora_convert.files.tensorfile import dtype_name
from bslora_convert.files.travel import copy_travelling
from bslora_convert.fit.source import Source
from bslora_convert.layers.slots import width_of
from bslora_convert.lora import LoraAdapter
from bslora_convert.lora.tables import taken
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.target import asked_in
from bslora_convert.results.adapter import (
    AimRecord,
    CompactRecord,
    EvidenceRecord,
    Fidelity,
    InitialisationRecord,
    SecondsRecord,
    SourceRecord,
    TrainingRecord,
)
from bslora_convert.version import __version__


@dataclass(frozen=True, slots=True)
class Extras:
    """What there is beside the fit: the records of evidence, training and de-duplication, the training's steps, notes.

    evidence: how rows of prompts were used. aim: how a behaviour that was asked for was sought.
    """

    evidence: EvidenceRecord | None = None
    training: TrainingRecord | None = None
    log: Sequence[Mapping[str, Any]] = ()
    notes: tuple[str, ...] = ()
    deduplication: dict[str, int] | None = None
    aim: AimRecord | None = None


@dataclass(frozen=True, slots=True)
class Origin:
    """What a result was made from: the adapter, its deltas, the hash of its weights, what the record calls it.

    known: its random initialisation, where that was found.
    """

    adapter: LoraAdapter
    measured: Source
    sha256: str
    name: str
    known: Known | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """What was written, for whoever describes it: its record, its configuration, the source's spectra, a training's steps."""

    record: Fidelity
    config: Mapping[str, Any]
    spectra: Mapping[str, Tensor]
    log: Sequence[Mapping[str, Any]]


def write_result(
    place: Path,
    made: Converted,
    origin: Origin,
    recipe: Mapping[str, Any],
    extras: Extras,
    seconds: Mapping[str, float] | None,
    progress: Progress = silent,
) -> Written:
    """Writes the adapter and what travels along into `place`, reads it back and measures it.

    seconds: spent so far, by step; None leaves time out of the record.
    """
    began = time.perf_counter()
    adapter, measured = origin.adapter, origin.measured
    progress("writing")
    save_compact(made.form, place, adapter.config.raw, adapter.carried, codes=made.codes, initial=made.initial)
    beside = (
        *taken(adapter.carried, (place / WEIGHTS_NAME).stat().st_size),
        *copy_travelling(adapter.weights.parent, place),
    )
    notes = (*adapter.notes, *made.notes, *extras.notes, *beside)
    progress("measuring what was written")
    with ThreadPoolExecutor(1) as pool:  # hashing leaves the interpreter lock
        hashing = pool.submit(sha256, place / WEIGHTS_NAME)
        compact = load_compact(place)
        kept = fidelity.compare(measured, compact.form)
        written = hashing.result()
    record = Fidelity(
        schema_version=fidelity.SCHEMA_VERSION,
        tool_version=__version__,
        source=_source_record(origin),
        recipe=dict(recipe),
        compact=_compact_record(compact, place, adapter, written),
        weight=kept.to_record(),
        coding=fidelity.coding(measured, compact, kept.least_error) if compact.codes else None,
        initialisation=_initialisation(origin, compact, kept.relative_error) if compact.codes else None,
        baselines=fidelity.svd_baselines(measured, _numbers(compact), adapter.parameters),
        functional=None,
        aim=extras.aim or AimRecord(asked=asked_in(recipe), path=[], proofs=[]),
        evidence=extras.evidence,
        training=extras.training,
        deduplication=extras.deduplication,
        notes=list(dict.fromkeys(notes)),
        seconds=_seconds(seconds, time.perf_counter() - began),
    )
    return Written(record, compact.config, measured.spectra, extras.log)


def _initialisation(origin: Origin, compact: CompactAdapter, error: float) -> InitialisationRecord | None:
    if origin.known is None:
        return None
    return replace(
        describe(origin.known, origin.adapter),
        used=sum(bool(entry.initial) for entry in compact.layout.modules.values()),
        bytes_without=bytes_without(origin.measured, error**2 * origin.measured.energy),
    )


def _seconds(spent: Mapping[str, float] | None, writing: float) -> SecondsRecord:
    if spent is None:
        return SecondsRecord(read=None, fit=None, write=None, total=None)
    return SecondsRecord(read=spent["read"], fit=spent["fit"], write=writing, total=sum(spent.values()) + writing)


def _numbers(compact: CompactAdapter) -> int:
    """Numbers of plain SVD's that take as much room: codes are weighed by their bytes."""
    if not compact.codes:
        return compact.parameters
    return sum(tensor.nbytes for tensor in compact.codes.values()) // compact.dtype.itemsize


def _source_record(origin: Origin) -> SourceRecord:
    adapter = origin.adapter
    return SourceRecord(
        path=origin.name,
        sha256=origin.sha256,
        bytes=adapter.weights.stat().st_size,
        parameters=adapter.parameters,
        modules=len(adapter.modules),
        ranks={str(rank): count for rank, count in Counter(module.rank for module in adapter.modules.values()).items()},
        width=width_of({name: module.shape for name, module in adapter.modules.items()}),
        dtype=dtype_name(adapter.dtype),
        card=carried(adapter.weights.parent) or None,
    )


def _compact_record(compact: CompactAdapter, place: Path, adapter: LoraAdapter, digest: str) -> CompactRecord:
    form = compact.form
    locals_ = {name: module.local.rank for name, module in form.modules.items()}
    same = len(set(locals_.values())) == 1
    size = (place / WEIGHTS_NAME).stat().st_size
    return CompactRecord(
        transform=form.transform_name,
        ranks={
            "local": next(iter(locals_.values())) if same else locals_,
            "intra": form.shared_rank("intra"),
            "inter": form.shared_rank("inter"),
        },
        shared_size=max(form.transform.pair_sizes) if form.transform else None,
        bytes=size,
        parameters=compact.parameters,
        parameters_by_part=compact.parts_parameters,
        parameter_ratio=compact.parameters / adapter.parameters,
        byte_ratio=size / adapter.weights.stat().st_size,
        expanded_rank=max(form.expanded_rank(name) for name in form.modules),
        unique_tensors=sum(1 for _ in form.tensors()),
        dtype=dtype_name(compact.dtype),
        config_bytes=(place / CONFIG_NAME).stat().st_size,
        loaded_bytes=loaded_bytes(compact) if compact.codes else None,
        sha256=digest,
    )


def loaded_bytes(compact: CompactAdapter) -> int:
    """Bytes of what a reader holds once codes are decoded."""
    return sum(tensor.nbytes for tensor in (*compact.form.tensors(), *compact.carried.values()))
