"""The main job: a LoRA directory in, a compact directory with a report that was measured on what was written.

read -> fit -> cast -> write beside -> read back -> measure -> report -> rename into place
"""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bslora_convert import fidelity
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.storage import WEIGHTS_NAME, CompactAdapter, load_compact, save_compact
from bslora_convert.errors import InputError, RecipeError, ThresholdMissed
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
from bslora_convert.landing import check_output, landing
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.recipe import Recipe
from bslora_convert.tensorfile import dtype_name, sha256
from bslora_convert.tokenizer import copy_tokenizer
from bslora_convert.version import __version__

SMALLEST_NORM, LARGEST_NORM = 1e-12, 1e12
ERROR_ATTEMPTS = 4  # refits that leave room for the storage dtype's rounding

Progress = Callable[[str], None]


def compress(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    overwrite: bool = False,
    report_html: bool = True,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Converts one LoRA adapter into a compact BSLoRA directory and returns what its `fidelity.json` holds.

    :raises InputError: when the source is missing or damaged.
    :raises Refused: when the source is valid but can't be converted faithfully.
    :raises RecipeError: when the recipe can't be met (a budget below the transform's least form).
    :raises ThresholdMissed: when `max_error` can't be met.
    :raises OutputError: when the output place can't be used; nothing is left behind.
    """
    from bslora_convert import report

    recipe, out = recipe or Recipe(), Path(out)
    check_output(out, overwrite)
    began = time.perf_counter()
    progress("reading")
    adapter = load_lora(source)
    _check_paths(adapter.weights, out)
    # Hashing runs beside the fit: both leave the interpreter lock.
    with ThreadPoolExecutor(1) as pool, modules_over_cores():
        digest = pool.submit(sha256, adapter.weights)
        adapter = adapter.to(_device(recipe.device))
        read = time.perf_counter()
        measured = measure(adapter.modules, {name: module.kind for name, module in adapter.modules.items()})
        _check_magnitude(measured, adapter.weights)
        dtype = adapter.dtype if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
        fit = _fit(measured, recipe, dtype, progress)
        fit = replace(fit, form=_cast(fit.form, dtype))  # the float32 form is let go
        fitted = time.perf_counter()
        progress("writing")
        with landing(out, overwrite) as place:
            save_compact(fit.form, place, adapter.config.raw, adapter.carried)
            copy_tokenizer(adapter.weights.parent, place)
            progress("measuring what was written")
            compact = load_compact(place)
            weight = fidelity.compare(measured, compact.form)
            if recipe.max_error is not None and weight.relative_error > recipe.max_error:
                raise ThresholdMissed(
                    f"--max-error {recipe.max_error:g} is finer than {recipe.dtype if recipe.dtype != 'auto' else dtype} "
                    f"can hold (reached {weight.relative_error:.4g}); use --dtype float32"
                )
            record = {
                "schema_version": fidelity.SCHEMA_VERSION,
                "tool_version": __version__,
                "source": _source_record(adapter, digest.result(), dtype_name(adapter.dtype)),
                "recipe": recipe.to_dict(),
                "compact": _compact_record(compact, place, adapter, fit),
                "weight": weight.to_dict(),
                "baselines": fidelity.svd_baselines(measured, compact.form.parameters),
                "functional": None,
                "notes": [*adapter.notes, *fit.notes],
            }
            written = time.perf_counter()
            record["seconds"] = {
                "read": read - began,
                "fit": fitted - read,
                "write": written - fitted,
                "total": written - began,
            }
            report.write(place, record, measured.spectra, compact, html=report_html)
    return record


def _fit(source: Source, recipe: Recipe, dtype: torch.dtype, progress: Progress) -> Fit:
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
    source: Source, options: Options, error: float, dtype: torch.dtype, progress: Progress
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


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"device is {name}: no CUDA device is available here; use --device cpu")
    return torch.device(name)


def _check_paths(weights: Path, out: Path) -> None:
    """Refuses an output place that would replace the source."""
    source, target = weights.resolve().parent, out.resolve()
    if target == source or target in source.parents:
        raise InputError(f"{out}: the output would replace the source {source}")


def _source_record(adapter: LoraAdapter, digest: str, dtype: str) -> dict[str, Any]:
    ranks: dict[str, int] = {}
    for module in adapter.modules.values():
        ranks[str(module.rank)] = ranks.get(str(module.rank), 0) + 1
    return {
        "path": str(adapter.path),
        "sha256": digest,
        "bytes": adapter.weights.stat().st_size,
        "parameters": adapter.parameters,
        "modules": len(adapter.modules),
        "ranks": ranks,
        "dtype": dtype,
    }


def _compact_record(compact: CompactAdapter, place: Path, adapter: LoraAdapter, fit: Fit) -> dict[str, Any]:
    form = compact.form
    locals_ = {name: module.local.rank for name, module in form.modules.items()}
    same = len(set(locals_.values())) == 1
    size = (place / WEIGHTS_NAME).stat().st_size
    return {
        "transform": form.transform.name if form.transform else "none",
        "ranks": {
            "local": next(iter(locals_.values())) if same else locals_,
            "intra": form.shared_rank("intra"),
            "inter": form.shared_rank("inter"),
        },
        "shared_size": max(form.transform.pair_sizes) if form.transform else None,
        "bytes": size,
        "parameters": form.parameters,
        "parameters_by_part": form.parts_parameters(),
        "parameter_ratio": form.parameters / adapter.parameters,
        "byte_ratio": size / adapter.weights.stat().st_size,
        "expanded_rank": max(form.expanded_rank(name) for name in form.modules),
        "unique_tensors": sum(1 for _ in form.tensors()),
        "dtype": dtype_name(compact.dtype),
    }
