"""`compare`: fits every form to one adapter at the sizes asked for and measures each in weights and, if asked, in behaviour."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bslora_convert.baselines.baseline import Fitted, OutOfReach
from bslora_convert.behaviour.adapter import Adapter
from bslora_convert.behaviour.divergence import Divergence
from bslora_convert.behaviour.memory import free_bytes
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.bslora.form import BsloraForm, Module
from bslora_convert.comparison.forms import FORMS, KNOWING, OWN_SIZE, SCALED, SEARCHED, SUFFIX, USUAL, as_strong
from bslora_convert.conversion.initial import check_init, look_for
from bslora_convert.errors import RecipeError
from bslora_convert.extras import need
from bslora_convert.files.address import resolve
from bslora_convert.files.hashing import sha256
from bslora_convert.files.landing import check_apart, check_output, landing
from bslora_convert.files.record import COMPARISON_NAME, seal
from bslora_convert.files.store import as_written
from bslora_convert.files.tensorfile import dtype_name
from bslora_convert.fit.device import pick_device
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.fit.source import Source, check_magnitude, measure
from bslora_convert.initialisation.initial import Initial
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.lora.writer import save_lora
from bslora_convert.modules.lowrank import inner, residual_energy
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.comparing import CompareOptions
from bslora_convert.recipe.options import built
from bslora_convert.recipe.storage import INITS
from bslora_convert.results.analysis import Comparison, FormBehaviour, FormRow
from bslora_convert.version import __version__

SCHEMA_VERSION = 1
Found = tuple[FormRow, Fitted | None]  # a row, and the fit behind it
ATTACHED_SHARE = 0.5  # of the free memory, for the forms that are on the model at the same time


def compare(
    lora: str | Path,
    out: str | Path | None = None,
    options: CompareOptions | None = None,
    *,
    progress: Progress = silent,
    **fields: Any,
) -> Comparison:
    """Fits every form to a LoRA at each budget and returns what `comparison.json` holds.

    out: a directory for `comparison.json` and `comparison.html`, and with `save` for each form as an adapter that PEFT loads.
    options, or fields of `CompareOptions`: with base_model and prompts, each form's KL to the original, retention, agreement and
    likelihood on these prompts too.

    :raises InputError: when something is missing or damaged. :raises Refused: when the adapter can't be read faithfully.
    :raises RecipeError: for an option that is not allowed. :raises OutputError: when `out` can't be used.
    """
    asked = built(CompareOptions, options, fields)
    _check(asked, out)
    if out is not None:
        check_output(Path(out), asked.overwrite, resolve(lora))
    rows = Prompts.read(asked.prompts, asked.limit, batch_size=asked.batch_size) if asked.prompts is not None else None
    progress("reading")
    adapter = load_lora(lora, **asked.arguments)
    if out is not None:
        check_apart(adapter.weights, Path(out))  # it may stand in a sub-folder
    storage = adapter.dtype if asked.dtype == "auto" else getattr(torch, asked.dtype)
    chosen = [name for name in FORMS if name in (asked.forms or USUAL)]
    known = look_for(adapter, "none" if KNOWING.isdisjoint(chosen) else asked.init, progress=progress)
    initial = None if known is None else known.initial
    digest, found = sha256(adapter.weights), _fitted(adapter, initial, chosen, storage, asked, progress)
    if rows is not None:
        reference = Adapter.of_lora(adapter, Path(lora), digest)
        with BaseModelSession(reference, str(asked.base_model), asked.device, "auto", progress) as session:
            found = _with_behaviour(found, session, rows)
    record = Comparison(
        schema_version=SCHEMA_VERSION,
        tool_version=__version__,
        source={
            "path": as_written(adapter.path),
            "sha256": digest,
            "parameters": adapter.parameters,
            "modules": len(adapter.modules),
        },
        dtype=dtype_name(storage),
        rows=[row for row, _ in found],
    )
    if out is not None:
        from bslora_convert.report import comparison as report

        with landing(Path(out), asked.overwrite) as place:
            if asked.save:
                _save(found, place, adapter, storage)
            report.write(place, record)
            record = replace(record, files=seal(place, COMPARISON_NAME, record.to_dict()))
    return record


def _fitted(
    adapter: LoraAdapter, initial: Initial | None, chosen: Sequence[str], storage: torch.dtype, asked: CompareOptions,
    progress: Progress,
) -> list[Found]:  # fmt: skip
    """Every form chosen at every size. initial: A's random initialisation, where it is known."""
    tasks = [(name, budget) for budget in asked.budgets for name in chosen if name not in OWN_SIZE]
    tasks += [(name, math.nan) for name in chosen if name in OWN_SIZE]
    found: list[Found] = []
    fits: dict[tuple[str, float], Fitted | None] = {}
    with modules_over_cores():
        where = pick_device(asked.device)
        source = replace(measure(adapter.to(where).modules, adapter.kinds), initial=initial)
        check_magnitude(source, adapter.weights)
        here = source
        if where.type != "cpu" and not SEARCHED.isdisjoint(chosen):
            here = replace(measure(adapter.modules, adapter.kinds), initial=initial)
        for done, (name, budget) in enumerate(tasks):
            progress(f"fitting {name}", done, len(tasks))
            plain = fits.get((name.removesuffix(SUFFIX), budget))  # what is unbiased is that, scaled
            own = here if name in SEARCHED else source
            row, fitted = _row(name, budget, own, storage, asked.seed, plain if name in SCALED else None)
            found.append((row, fitted))
            fits[name, budget] = fitted
    return found


def _row(name: str, budget: float, source: Source, storage: torch.dtype, seed: int, plain: Fitted | None) -> Found:
    """One form at one size: its numbers, or why it has none. plain: what it only scales, where that is fitted already."""
    own_size = math.isnan(budget)
    numbers = source.parameters if own_size else math.floor(budget * source.parameters)
    began = time.perf_counter()
    try:
        fitted = FORMS[name](source, numbers, storage, seed) if plain is None else as_strong(source, plain, storage)
    except OutOfReach as reason:
        row = FormRow(
            form=name, budget=1.0 if own_size else budget, parameters=None, parameter_ratio=None, bytes=None, byte_ratio=None,
            relative_error=None, gain=None, seconds=time.perf_counter() - began, note=str(reason), settings={}, functional=None,
        )  # fmt: skip
        return row, None
    seconds = time.perf_counter() - began
    lost = along = 0.0
    for module, delta in source.deltas.items():
        target, made = delta.factors(), fitted.deltas[module]
        lost += residual_energy(target, source.grams[module], made)
        along += inner(target, made)
    size = fitted.parameters * storage.itemsize if fitted.bytes is None else fitted.bytes
    share = size / (source.parameters * storage.itemsize)
    row = FormRow(
        form=name,
        budget=share if own_size else budget,
        parameters=fitted.parameters,
        parameter_ratio=fitted.parameters / source.parameters,
        bytes=size,
        byte_ratio=share,
        relative_error=math.sqrt(lost / source.energy) if source.energy else 0.0,
        gain=along / source.energy if source.energy else 1.0,
        seconds=seconds,
        note="; ".join(note for note in ("at its own size" if own_size else "", fitted.note) if note),
        settings=dict(fitted.settings),
        functional=None,
    )
    return row, fitted


def _with_behaviour(found: Sequence[Found], session: BaseModelSession, prompts: Prompts) -> list[Found]:
    """The same with behaviour on the prompts in the rows that were fitted."""
    examples = session.encode(prompts).examples
    fits = {str(index): fitted for index, (_, fitted) in enumerate(found) if fitted is not None}
    most = ATTACHED_SHARE * free_bytes(session.base.device)
    measured: dict[str, Divergence] = {}

    for names in handfuls({name: _floats(fitted) for name, fitted in fits.items()}, most / 4):
        forms = {name: _as_form(fits[name], session.adapter.form) for name in names}
        before, whole = len(measured) * len(examples), len(fits) * len(examples)
        measured |= session.measure(forms, examples, prompts.batch_size, "measuring behaviour", before, whole)
    return [
        (replace(row, functional=_behaviour(measured[str(index)], len(examples))), fitted)
        if fitted is not None
        else (row, None)
        for index, (row, fitted) in enumerate(found)
    ]


def _behaviour(divergence: Divergence, rows: int) -> FormBehaviour:
    values = divergence.to_dict()
    return FormBehaviour(
        **{name: values[name] for name in ("kl", "base_kl", "retention", "agreement")},
        nll=values["nll"]["compact"],
        nll_reference=values["nll"]["reference"],
        rows=rows,
    )


def handfuls(sizes: Mapping[str, int], most: float) -> list[list[str]]:
    """Names in order, as many at a time as hold `most` together, one at least."""
    found: list[list[str]] = []
    room = 0.0
    for name, size in sizes.items():
        if not found or size > room:
            found.append([])
            room = most
        found[-1].append(name)
        room -= size
    return found


def _floats(fitted: Fitted) -> int:
    """Numbers that a fit's modules hold when written out as factors."""
    return sum(factors.parameters for factors in fitted.deltas.values())


def _as_form(fitted: Fitted, like: BsloraForm) -> BsloraForm:
    """What a fit makes of each module as local parts, for running it."""
    modules = {
        name: Module(like.modules[name].shape, factors, {}, like.modules[name].kind)
        for name, factors in fitted.deltas.items()
    }
    return BsloraForm(None, modules)


def _save(found: Sequence[Found], place: Path, adapter: LoraAdapter, storage: torch.dtype) -> None:
    """Every fit as a directory of its own: in its own method where PEFT has it, as an expanded LoRA otherwise."""
    for row, fitted in found:
        if fitted is None:
            continue
        directory = place / f"{row.form}-{row.budget:.4g}"
        directory.mkdir()
        if fitted.save is not None:
            fitted.save(directory, adapter.config.raw)
        else:
            save_lora(directory, fitted.deltas, adapter.kinds, adapter.carried, adapter.config.raw, storage)


def _check(asked: CompareOptions, out: str | Path | None) -> None:
    """:raises RecipeError: for a form that is not known, an extra that is missing, and `save` without a place."""
    unknown = sorted(set(asked.forms) - set(FORMS))
    if unknown:
        raise RecipeError(f"forms: {', '.join(unknown)} unknown; known are {', '.join(FORMS)}", "forms")
    if asked.save and out is None:
        raise RecipeError("save needs an output directory: give out", "save", "out")
    check_init(asked.init)
    if asked.init not in INITS[:2] and KNOWING.isdisjoint(asked.forms or USUAL):
        raise RecipeError(
            f"init is {asked.init!r}: none of these forms uses A's random initialisation; give auto or none", "init"
        )
    if not asked.forms or "vb_lora" in asked.forms:
        need("analysis", "the form vb_lora")
