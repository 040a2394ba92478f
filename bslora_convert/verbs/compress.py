"""The main job: a LoRA directory in, a compact directory with a report that was measured on what was written.

read -> metric (plain, or of prompts) -> fit -> code -> [distil] -> write beside -> read back -> measure -> tell -> rename

For a behaviour, `behaviour.reaching` walks over fit, code and distil from outside.

Where the source is in the authors' BSLoRA layout there is nothing to fit: see `conversion.found`.
"""

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bslora_convert.behaviour.checkpoints import directory_of, forget_completions
from bslora_convert.behaviour.processes import is_writer, meet, written_by_another
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.bslora.official import is_official
from bslora_convert.conversion.fitting import Stored, fit_stored, missed
from bslora_convert.conversion.found import OfficialSource, as_found, load_source
from bslora_convert.conversion.writing import Extras, Origin, write_result
from bslora_convert.errors import RecipeError, ThresholdMissed
from bslora_convert.extras import need
from bslora_convert.files.address import resolve
from bslora_convert.files.hashing import sha256
from bslora_convert.files.landing import check_apart, check_output, landing
from bslora_convert.fit.convert import Source, measure
from bslora_convert.fit.device import pick_device
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.fit.source import check_magnitude
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.training import Training
from bslora_convert.report.conversion import publish
from bslora_convert.results.adapter import Fidelity

if TYPE_CHECKING:
    from bslora_convert.behaviour.distill import Distilled
    from bslora_convert.behaviour.evidence import Evidence
    from bslora_convert.behaviour.judge import Judge
    from bslora_convert.behaviour.reaching import Distil
    from bslora_convert.behaviour.workshop import Workshop


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
) -> Fidelity:
    """Converts one LoRA adapter into a compact BSLoRA directory and returns what its `fidelity.json` holds.

    An adapter in the authors' BSLoRA layout is kept as it is, each tensor once; the recipe's fit is not made.

    training: how to distil where the recipe says `finetune`. source_name: what the record calls the source, instead of its path.
    timed: whether the record says how long it took; without that the same input gives the same bytes in every file.

    :raises InputError: when the source, a prompt file or the base model is missing or damaged, or they don't belong together.
    :raises Refused: when the source is valid but can't be converted faithfully.
    :raises RecipeError: when the recipe can't be met (a budget below the transform's least form).
    :raises ThresholdMissed: when an error or a behaviour that was asked for can't be met.
    :raises OutputError: when the output place can't be used; nothing is left behind.
    """
    recipe, out = recipe or Recipe(), Path(out)
    recipe.check_evidence()
    training = training or Training(seed=recipe.seed)
    if recipe.evidence.base_model is None and training != Training(seed=recipe.seed):
        raise RecipeError(
            "options of a training were given without one: give finetune and base_model", "finetune", "base_model"
        )
    if recipe.form.groups == "auto":
        need("analysis", "groups auto", "groups")
    check_output(out, overwrite, resolve(source))
    began = time.perf_counter()
    progress("reading")
    prompts = _prompts(recipe, training)
    adapter = load_source(source, recipe) if is_official(source) else load_lora(source, **recipe.scaling.given)
    check_apart(adapter.weights, out)  # it may stand in a sub-folder
    workshop = _open(source, recipe, progress)
    with closing(workshop) if workshop is not None else nullcontext():
        evidence = _evidence(workshop, recipe, prompts, training, out, began)
        # Hashing runs beside the fit: both leave the interpreter lock.
        with ThreadPoolExecutor(1) as pool, modules_over_cores():
            digest = pool.submit(sha256, adapter.weights)
            device = pick_device(recipe.device)
            adapter = adapter.to("cpu" if recipe.is_coded else device)  # codes are searched on the CPU
            read = time.perf_counter()
            measured = measure(adapter.modules, adapter.kinds)
            check_magnitude(measured, adapter.weights)
            dtype = adapter.dtype if recipe.storage.dtype == "auto" else getattr(torch, recipe.storage.dtype)
            if isinstance(adapter, OfficialSource):
                found, used, extras = as_found(adapter, recipe)
                fit = Stored.of(found, dtype, used)
            else:
                distil = _distillation(workshop, recipe, prompts, training, evidence, out, began)
                fit, extras = _fitted(measured, recipe, dtype, adapter, workshop, evidence, distil, progress)
            notes = (*adapter.notes, *fit.notes)
    if recipe.evidence.finetune is not None and not is_writer():
        return Fidelity.from_dict(written_by_another(out))
    with modules_over_cores(), landing(out, overwrite) as place:
        fitted = time.perf_counter()
        origin = Origin(adapter, measured, digest.result(), source_name)
        extras = replace(extras, codes=fit.codes, notes=(*notes, *extras.notes))
        seconds = {"read": read - began, "fit": fitted - read} if timed else None
        written = write_result(place, fit.form, origin, fit.recipe.to_dict(), extras, seconds, progress)
        record = publish(place, written, html=report_html)
        error = record.weight.relative_error
        allowed = recipe.aim.max_error if recipe.aim.asked else None
        if allowed is not None and recipe.evidence.base_model is None and error > allowed:
            raise ThresholdMissed(missed(recipe, error, fitted=not isinstance(adapter, OfficialSource)))
    if recipe.evidence.base_model is not None:
        forget_completions(out)
    if recipe.evidence.finetune is not None:
        meet()
    return record


def _prompts(recipe: Recipe, training: Training) -> dict[str, Prompts]:
    """The rows of every prompt file that the recipe names, read before anything is computed."""
    return {name: Prompts.read(path, **training.reading) for name, path in recipe.evidence.files.items()}


def _open(source: str | Path, recipe: Recipe, progress: Progress) -> "Workshop | None":
    """The base model with the source on it, before the fit: one that does not fit costs no more than looking at it."""
    if recipe.evidence.base_model is None:
        return None
    from bslora_convert.behaviour.workshop import open_workshop

    return open_workshop(
        source, recipe.evidence.base_model, recipe.device, "auto", progress, scaling=recipe.scaling.given
    )


def _evidence(
    workshop: "Workshop | None",
    recipe: Recipe,
    prompts: Mapping[str, Prompts],
    training: Training,
    out: Path,
    began: float,
) -> "Evidence | None":
    """The rows of `prompts` in their three parts."""
    if workshop is None or "prompts" not in prompts:
        return None
    from bslora_convert.behaviour.evidence import gather
    from bslora_convert.behaviour.writing import Writing, deadline_of

    writing = Writing(directory_of(out), deadline_of(began, training.max_minutes))
    return gather(workshop, prompts["prompts"], recipe.seed, writing)


def _distillation(
    workshop: "Workshop | None",
    recipe: Recipe,
    prompts: Mapping[str, Prompts],
    training: Training,
    evidence: "Evidence | None",
    out: Path,
    began: float,
) -> "Distil | None":
    """What trains a fit, where the recipe asks for it."""
    if workshop is None or recipe.evidence.finetune is None:
        return None
    from bslora_convert.behaviour.improvement import distilled

    rows = evidence if recipe.evidence.finetune is True else None

    def distil(stored: Stored) -> "Distilled":
        return distilled(
            workshop, stored.form, prompts.get("finetune"), training,
            codes=stored.codes, evidence=rows, completions=directory_of(out), began=began,
        )  # fmt: skip

    return distil


def _fitted(
    measured: Source,
    recipe: Recipe,
    dtype: torch.dtype,
    adapter: LoraAdapter,
    workshop: "Workshop | None",
    evidence: "Evidence | None",
    distil: "Distil | None",
    progress: Progress,
) -> tuple[Stored, Extras]:
    """The fit: in the metric of the prompts that does best, of the behaviour asked for, distilled, as the recipe says."""
    if workshop is None or evidence is None:
        return _trained(fit_stored(measured, recipe, dtype, adapter, progress), Extras(), distil)
    from bslora_convert.behaviour.judge import Judge

    judge = Judge(workshop, evidence, measured, dtype, adapter, progress)
    if recipe.aim.behaviour is not None:
        return _of_behaviour(judge, recipe, distil)
    judged = judge.fit(recipe)
    extras = Extras(evidence={"rows": evidence.rows, "metric": judged.metric}, notes=(*evidence.notes, *judged.notes))
    fit, extras = _trained(judged.stored, extras, distil)
    proof = evidence.proof(judge.rows(fit.form, evidence.prove), recipe.seed)
    return fit, replace(extras, evidence={**(extras.evidence or {}), "proof": proof})


def _trained(fit: Stored, extras: Extras, distil: "Distil | None") -> tuple[Stored, Extras]:
    """The fit distilled, where that is asked for."""
    if distil is None:
        return fit, extras
    done = distil(fit)
    return replace(fit, form=done.form, codes=done.codes), _with_training(extras, done)


def _with_training(extras: Extras, done: "Distilled") -> Extras:
    return replace(extras, training=done.record, log=done.log, notes=(*extras.notes, *done.notes))


def _of_behaviour(judge: "Judge", recipe: Recipe, distil: "Distil | None") -> tuple[Stored, Extras]:
    """The smallest fit of the behaviour that is asked for."""
    from bslora_convert.behaviour.distill import Distilled
    from bslora_convert.behaviour.reaching import fit_to_behaviour

    found = fit_to_behaviour(judge, recipe, distil)
    evidence = {"rows": judge.evidence.rows, "metric": found.fit.metric, "proof": found.record["proofs"][-1]}
    notes = (*judge.evidence.notes, *found.fit.notes, *found.notes)
    extras = Extras(evidence=evidence, aim=found.record, notes=notes)
    if isinstance(found.made, Distilled):
        extras = _with_training(extras, found.made)
    return Stored(found.made.form, found.made.codes, recipe, found.fit.stored.notes), extras
