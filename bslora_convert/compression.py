"""The main job: a LoRA directory in, a compact directory with a report that was measured on what was written.

read -> fit -> cast -> (calibrate, distil on the base) -> write beside -> read back -> measure -> report -> rename into place

Where the source is in the authors' BSLoRA layout there is nothing to fit: see `deduplication`.
"""

import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bslora_convert import fidelity
from bslora_convert.behaviour.processes import is_writer, meet, written_by_another
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.training import Training
from bslora_convert.bslora.coding.file import file_overhead, to_file
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.official import is_official
from bslora_convert.deduplication import OfficialSource, as_found, load_source
from bslora_convert.device import pick_device
from bslora_convert.errors import InputError, RecipeError, ThresholdMissed
from bslora_convert.fit.coded import Aim, CodedForm, code_form
from bslora_convert.fit.convert import (
    Fit,
    Options,
    Source,
    fit_by_hand,
    fit_to_budget,
    fit_to_error,
    measure,
)
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.groups import candidates
from bslora_convert.landing import check_apart, check_output, landing
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.progress import Progress, silent
from bslora_convert.recipe import Recipe
from bslora_convert.result import Extras, write_result
from bslora_convert.tensorfile import sha256

SMALLEST_NORM, LARGEST_NORM = 1e-12, 1e12
TYPICAL_WIDTH = 4  # bits a number that a byte budget ends at, roughly
SAME_ERROR = 1e-3  # relative error under which two fits are equally good and the smaller one is kept
ERROR_ATTEMPTS = 4  # refits that leave room for the storage dtype's rounding


def compress(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    training: Training | None = None,
    overwrite: bool = False,
    report_html: bool = True,
    source_name: str | None = None,
    timed: bool = True,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Converts one LoRA adapter into a compact BSLoRA directory and returns what its `fidelity.json` holds.

    An adapter in the authors' BSLoRA layout is kept as it is, each tensor once; the recipe's fit is not made.

    training: how to distil where the recipe says `finetune`. source_name: what the record calls the source, instead of its path.
    timed: whether the record says how long it took; without that the same input gives the same bytes in every file.

    :raises InputError: when the source, a prompt file or the base model is missing or damaged, or they don't belong together.
    :raises Refused: when the source is valid but can't be converted faithfully.
    :raises RecipeError: when the recipe can't be met (a budget below the transform's least form).
    :raises ThresholdMissed: when `max_error` can't be met.
    :raises OutputError: when the output place can't be used; nothing is left behind.
    """
    recipe, out = recipe or Recipe(), Path(out)
    training = training or Training(seed=recipe.seed)
    check_output(out, overwrite)
    began = time.perf_counter()
    progress("reading", 0, 0)
    prompts = _prompts(recipe, training)
    adapter = load_source(source, recipe) if is_official(source) else load_lora(source)
    check_apart(adapter.weights.parent, out)
    # Hashing runs beside the fit: both leave the interpreter lock.
    with ThreadPoolExecutor(1) as pool, modules_over_cores():
        digest = pool.submit(sha256, adapter.weights)
        adapter = adapter.to(pick_device(recipe.device))
        read = time.perf_counter()
        measured = measure(adapter.modules, adapter.kinds)
        _check_magnitude(measured, adapter.weights)
        dtype = adapter.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        if isinstance(adapter, OfficialSource):
            fit, used, extras = as_found(adapter, recipe)
        else:
            fit, extras = _fit_stored(measured, recipe, dtype, adapter, lambda step: progress(step, 0, 0))
            used = recipe
        form = _cast(fit.form, dtype)
        notes = (*adapter.notes, *fit.notes)
        del fit  # the float32 form is let go
    if recipe.base_model is not None:
        form, extras = _improve(form, extras, source, measured, recipe, prompts, training, began, progress)
    if recipe.finetune is not None and not is_writer():
        return written_by_another(out)
    with modules_over_cores(), landing(out, overwrite) as place:
        fitted = time.perf_counter()
        record = write_result(
            place, form, adapter, measured, digest.result(), used.to_dict(), replace(extras, notes=(*notes, *extras.notes)),
            {"read": read - began, "fit": fitted - read} if timed else None, html=report_html, source_name=source_name,
            progress=lambda step: progress(step, 0, 0),
        )  # fmt: skip
        error = record["weight"]["relative_error"]
        if recipe.max_error is not None and recipe.base_model is None and error > recipe.max_error:
            raise ThresholdMissed(_missed(recipe, dtype, error))
    if recipe.finetune is not None:
        meet()
    return record


def _missed(recipe: Recipe, dtype: torch.dtype, error: float) -> str:
    if recipe.is_coded:
        size = f"--bytes {recipe.bytes:g}" if recipe.bytes is not None else f"--bits {recipe.bits}"
        return f"--max-error {recipe.max_error:g} can't be reached with {size} (reached {error:.4g}); raise one of them"
    return (
        f"--max-error {recipe.max_error:g} is finer than {recipe.dtype if recipe.dtype != 'auto' else dtype} "
        f"can hold (reached {error:.4g}); use --dtype float32"
    )


def _fit_stored(
    source: Source, recipe: Recipe, dtype: torch.dtype, adapter: LoraAdapter, progress: Callable[[str], None]
) -> tuple[Fit, Extras]:
    """The fit, in codes where the recipe asks for them."""
    if not recipe.is_coded:
        return _fit_grouped(source, recipe, dtype, progress), Extras()
    room = None
    if recipe.bytes is not None:
        size = adapter.weights.stat().st_size
        room = math.floor(recipe.bytes * size) - file_overhead(adapter.carried)
        if room <= 0:
            raise RecipeError(
                f"bytes is {recipe.bytes:g}: of the source's {size} bytes that leaves nothing beside what it carries along"
            )
    best: tuple[Fit, CodedForm] | None = None
    for name in ("none", "ke", "ss") if recipe.transform == "auto" else (recipe.transform,):
        fit = _float_for_codes(source, replace(recipe, transform=name), progress)
        progress(f"coding {name}")
        coded = _coded(source, fit.form, recipe, room, dtype)
        if best is None or (coded.lost, coded.bits) < (best[1].lost, best[1].bits):
            best = fit, coded
    assert best is not None  # there is a transform
    fit, coded = best
    return replace(fit, form=coded.form, lost=coded.lost), Extras(codes=to_file(coded.tensors))


def _float_for_codes(source: Source, recipe: Recipe, progress: Callable[[str], None]) -> Fit:
    """A fit in float32 whose shared parts suit the codes; with `bytes` one of as many numbers as a few bits each allow."""
    if recipe.bytes is not None:
        recipe = replace(recipe, bytes=None, max_error=None, budget=min(1.0, recipe.bytes * 16 / TYPICAL_WIDTH))
    return _fit_grouped(source, recipe, torch.float32, progress)


def _coded(source: Source, form: BsloraForm, recipe: Recipe, room: int | None, dtype: torch.dtype) -> CodedForm:
    """The form in codes; for an error, the fewest bits whose result still has it once written."""
    aim = Aim(bits=None if room is None else 8 * room, width=recipe.bits)
    if recipe.max_error is None:
        ranks = None if room is not None else {name: module.local.rank for name, module in form.modules.items()}
        return code_form(source, form, replace(aim, ranks=ranks), dtype)
    allowed = recipe.max_error**2 * source.energy
    lost = allowed
    coded = code_form(source, form, replace(aim, lost=lost), dtype)
    for _ in range(ERROR_ATTEMPTS):
        reached = fidelity.compare(source, coded.form).relative_error ** 2 * source.energy
        if reached <= allowed:
            break
        lost *= 0.99 * allowed / reached
        coded = code_form(source, form, replace(aim, lost=lost), dtype)
    return coded


def _prompts(recipe: Recipe, training: Training) -> dict[str, Prompts]:
    """The rows of every prompt file that the recipe names, read before anything is computed."""
    files = {name: getattr(recipe, name) for name in ("calibration", "finetune")}
    return {
        name: Prompts.read(path, max_length=training.max_length, batch_size=training.batch_size)
        for name, path in files.items()
        if path is not None
    }


def _improve(
    form: BsloraForm,
    extras: Extras,
    source: str | Path,
    measured: Source,
    recipe: Recipe,
    prompts: Mapping[str, Prompts],
    training: Training,
    began: float,
    progress: Progress,
) -> tuple[BsloraForm, Extras]:
    """Calibration and distillation, as the recipe asks."""
    from bslora_convert.behaviour.improvement import calibrated, distilled
    from bslora_convert.behaviour.workshop import open_workshop

    assert recipe.base_model is not None  # the caller sees to it
    workshop = open_workshop(source, recipe.base_model, recipe.device, "auto", progress)
    if "calibration" in prompts:
        uniform = recipe.local_ranks == "uniform"
        form, calibration, notes = calibrated(
            workshop, form, measured.deltas, prompts["calibration"], recipe.metric, uniform, recipe.seed
        )
        extras = replace(extras, calibration=calibration, notes=tuple(notes))
    if "finetune" in prompts:
        done = distilled(workshop, form, prompts["finetune"], training, codes=extras.codes, began=began)
        form = done.form
        extras = replace(
            extras, training=done.record, log=done.log, codes=done.codes, notes=(*extras.notes, *done.notes)
        )
    return form, extras


def _fit_grouped(source: Source, recipe: Recipe, dtype: torch.dtype, progress: Callable[[str], None]) -> Fit:
    """The fit under the groups that the recipe names, or of several groupings the one that is best for the size asked for."""
    fits = {
        name: _fit(replace(source, partition=partition), recipe, dtype, progress)
        for name, partition in candidates(source, recipe.groups).items()
    }
    if len(fits) == 1:
        return next(iter(fits.values()))
    allowed = max(min(fit.lost for fit in fits.values()), SAME_ERROR**2 * source.energy)
    if recipe.max_error is not None:
        allowed = math.inf  # all of them reach it
    best = min((name for name in fits if fits[name].lost <= allowed), key=lambda name: fits[name].form.parameters)
    error = {name: math.sqrt(fit.lost / source.energy) if source.energy else 0.0 for name, fit in fits.items()}
    found = ", ".join(f"{name} {fits[name].form.parameters:,} numbers at {error[name]:.4f}" for name in fits)
    note = f"groups auto compared {found}; {best} kept"
    return replace(fits[best], notes=(*fits[best].notes, note))


def _fit(source: Source, recipe: Recipe, dtype: torch.dtype, progress: Callable[[str], None]) -> Fit:
    options = Options(
        transform=recipe.transform,
        shared_size=recipe.shared_size,
        window=recipe.slice,
        kernel=recipe.kernel,
        min_shared=recipe.min_shared or 0,
        uniform=recipe.local_ranks == "uniform",
        seed=recipe.seed,
        storage=dtype,
    )
    if recipe.ranks is not None:
        return fit_by_hand(source, options, recipe.ranks, progress)
    if recipe.max_error is not None:
        return _fit_to_written_error(source, options, recipe.max_error, dtype, progress)
    assert recipe.budget is not None  # Recipe sees to it
    return fit_to_budget(source, options, math.floor(recipe.budget * source.parameters), progress)


def _fit_to_written_error(
    source: Source, options: Options, error: float, dtype: torch.dtype, progress: Callable[[str], None]
) -> Fit:
    """A fit whose error after rounding to the storage dtype is still at most `error`."""
    aim = error
    fit = fit_to_error(source, options, aim, progress)
    for _ in range(ERROR_ATTEMPTS):
        reached = fidelity.compare(source, _cast(fit.form, dtype)).relative_error
        if reached <= error:
            break
        room = aim**2 - 1.1 * (reached**2 - error**2)
        if room <= 0:
            break
        aim = math.sqrt(room)
        fit = fit_to_error(source, options, aim, progress)
    return fit


def _cast(form: BsloraForm, dtype: torch.dtype) -> BsloraForm:
    """The form in its storage dtype.

    :raises RecipeError: when a number is too large for it.
    """
    cast = form.to(dtype)
    if dtype == torch.float16 and not all(bool(tensor.isfinite().all()) for tensor in cast.tensors()):
        raise RecipeError("dtype float16 can't hold some of the numbers; use --dtype bfloat16 or float32")
    return cast


def _check_magnitude(source: Source, weights: Path) -> None:
    """Refuses deltas that float32 arithmetic would overflow or lose.

    :raises InputError: naming file and module.
    """
    for name, grams in source.grams.items():
        if not (grams.energy == 0 or SMALLEST_NORM**2 < grams.energy < LARGEST_NORM**2):
            raise InputError(
                f"{weights}: the update of {name} has the norm {math.sqrt(abs(grams.energy)):.3g}; "
                f"from {SMALLEST_NORM:g} to {LARGEST_NORM:g} can be fitted in float32"
            )
