"""The main job: a LoRA directory in, a compact directory with a report that was measured on what was written.

read -> metric (plain, or of prompts) -> fit -> code -> [distil] -> write beside -> read back -> measure -> tell -> rename

For a behaviour, `behaviour.reaching` walks over fit, code and distil from outside.

Where the source is in the authors' BSLoRA layout there is nothing to fit: see `conversion.found`.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bslora_convert.behaviour.checkpoints import forget_completions
from bslora_convert.behaviour.processes import is_writer, meet, written_by_another
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.training_rows import TrainingRun
from bslora_convert.bslora.common import Common, is_intact
from bslora_convert.bslora.official import is_official
from bslora_convert.conversion.convert import convert
from bslora_convert.conversion.found import OfficialSource, as_found, load_source
from bslora_convert.conversion.initial import Known, check_init, look_for
from bslora_convert.conversion.request import Converted, Request
from bslora_convert.conversion.writing import Extras, Origin, write_result
from bslora_convert.errors import RecipeError, ThresholdMissed
from bslora_convert.extras import need
from bslora_convert.files.address import resolve
from bslora_convert.files.hashing import sha256
from bslora_convert.files.landing import check_apart, check_output, landing
from bslora_convert.files.store import as_written
from bslora_convert.fit.device import pick_device
from bslora_convert.fit.parallel import modules_over_cores
from bslora_convert.fit.source import Source, check_magnitude, measure
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.lora.changed import only_changed, tables_of
from bslora_convert.lora.tables import stored_as
from bslora_convert.notes import Note
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.checks import is_whole
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.training import Training
from bslora_convert.report.conversion import publish
from bslora_convert.results.adapter import Fidelity

if TYPE_CHECKING:
    from bslora_convert.behaviour.session import BaseModelSession

FINEST_ERROR = 1e-4  # to which an error that could be reached is recorded


def compress(
    source: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    training: Training | None = None,
    overwrite: bool = False,
    report_html: bool = True,
    recorded_as: str | None = None,
    commons: Sequence[Path] | None = None,
    progress: Progress = silent,
) -> Fidelity:
    """Converts one LoRA adapter into a compact BSLoRA directory and returns what its `fidelity.json` holds.

    An adapter in the authors' BSLoRA layout is kept as it is, each tensor once; the recipe's fit is not made.

    training: how to distil where the recipe says `finetune`. recorded_as: what the record calls the source, instead of its path;
    then it leaves times out as well, so that the same input gives the same bytes in every file, wherever it lies.
    commons: files of initialisations that the library has of which this is a part (`bslora.common`), which must lie above `out`.

    :raises InputError: when the source, a prompt file or the base model is missing or damaged, or they don't belong together.
    :raises Refused: when the source is valid but can't be converted faithfully.
    :raises RecipeError: when the recipe can't be met (a budget below the transform's least form).
    :raises ThresholdMissed: when an error or a behaviour that was asked for can't be met.
    :raises OutputError: when the output place can't be used; nothing is left behind.
    """
    recipe, out = recipe or Recipe(), Path(out)
    training = training or Training(seed=recipe.seed)
    _check(recipe, training)
    check_output(out, overwrite, resolve(source))
    began = time.perf_counter()
    progress("reading")
    files = {name: Prompts.read(path, **training.reading) for name, path in recipe.calibration.files.items()}
    adapter = load_source(source, recipe) if is_official(source) else load_lora(source, **recipe.reading.arguments)
    check_apart(adapter.weights, out)  # it may stand in a sub-folder
    if isinstance(adapter, LoraAdapter):
        adapter = _with_tables(adapter, recipe)
    digest, request, run = sha256(adapter.weights), Request.of(recipe, adapter), TrainingRun(training, out, began)
    with _session(resolve(source), adapter, digest, recipe, progress) or nullcontext() as session:
        measured = _measured(adapter, recipe.device, request)
        known = _initialisation(adapter, recipe, request, commons, progress)
        measured = replace(measured, initial=None if known is None else known.initial)
        read = time.perf_counter()
        if isinstance(adapter, OfficialSource):
            made, used, extras = as_found(adapter, recipe)
        else:
            made, used, extras = _converted(measured, request, recipe, session, files, run, progress)
        if known is None and request.target.is_coded and recipe.storage.begins is not None:
            made = replace(made, notes=(*made.notes, f"is not like {recipe.storage.begins}, so it was coded without"))
    origin = Origin(adapter, measured, digest, recorded_as or as_written(adapter.path), known)
    if recipe.calibration.finetune is not None and not is_writer():
        return Fidelity.from_dict(written_by_another(out))
    begun = None if known is None or made.initial is None else known.common
    with _beside(out, begun), modules_over_cores(), landing(out, overwrite) as place:
        fitted = time.perf_counter()
        seconds = {"read": read - began, "fit": fitted - read} if recorded_as is None else None
        record = publish(
            place, write_result(place, made, origin, used.to_dict(), extras, seconds, progress), html=report_html
        )
        _check_error(recipe, adapter, record.weight.relative_error)
    if recipe.calibration.runs:
        forget_completions(out)
    if recipe.calibration.finetune is not None:
        meet()
    return record


@contextmanager
def _beside(out: Path, begun: Common | None) -> Iterator[None]:
    """What training went on from, written beside a result; it goes again if the result fails and it was not there before."""
    if begun is None:
        yield
        return
    was_there = is_intact(out.parent / begun.name)
    try:
        begun.write(out.parent)
        yield
    except BaseException:
        if not was_there:
            (out.parent / begun.name).unlink(missing_ok=True)
        raise


def _check(recipe: Recipe, training: Training) -> None:
    """What can be refused before anything is read."""
    recipe.check_target()
    check_init(recipe.storage.init)
    if not recipe.calibration.runs and training != Training(seed=recipe.seed):
        raise RecipeError(
            "options of a training were given without one: give finetune and base_model", "finetune", "base_model"
        )
    if recipe.structure.groups == "auto":
        need("analysis", "groups auto", "groups")


def _with_tables(adapter: LoraAdapter, recipe: Recipe) -> LoraAdapter:
    """The adapter with the weights that it holds whole as they are to be stored."""
    calibration, base_model = recipe.calibration, recipe.calibration.base_model
    if base_model is not None and tables_of(adapter):
        adapter = only_changed(adapter, base_model)
    elif base_model is not None and not calibration.runs:
        adapter = replace(
            adapter, notes=(*adapter.notes, f"{base_model} was not used: no prompts, and no saved tables")
        )
    whole, said = stored_as(adapter.carried, recipe.storage.tables)
    return replace(adapter, carried=whole, notes=(*adapter.notes, *said))


def _session(
    source: Path, adapter: LoraAdapter, digest: str, recipe: Recipe, progress: Progress
) -> "BaseModelSession | None":
    """The base model with the source on it, before anything is fitted: one that does not fit costs no more than looking at it."""
    base_model = recipe.calibration.base_model
    if base_model is None or not recipe.calibration.runs:
        return None
    from bslora_convert.behaviour.adapter import Adapter
    from bslora_convert.behaviour.session import BaseModelSession

    return BaseModelSession(Adapter.of_lora(adapter, source, digest), base_model, recipe.device, "auto", progress)


def _measured(adapter: LoraAdapter, device: str, request: Request) -> Source:
    """The adapter's deltas with their SVDs, on the device where they are fitted: codes are searched on the CPU."""
    where = pick_device(device)
    with modules_over_cores():
        measured = measure(adapter.to("cpu" if request.target.is_coded else where).modules, adapter.kinds)
    check_magnitude(measured, adapter.weights)
    return measured


def _initialisation(
    adapter: LoraAdapter, recipe: Recipe, request: Request, commons: Sequence[Path] | None, progress: Progress
) -> Known | None:
    """The random initialisation of what is to be coded."""
    if isinstance(adapter, OfficialSource) or not request.target.is_coded:
        return None
    return look_for(adapter, recipe.storage.init, commons, progress)


def _converted(
    measured: Source, request: Request, recipe: Recipe, session: "BaseModelSession | None", files: Mapping[str, Prompts],
    run: TrainingRun, progress: Progress,
) -> tuple[Converted, Recipe, Extras]:  # fmt: skip
    """The conversion, the recipe that it is of, and the records of how it came about."""
    if session is None:
        return *_nearest(convert(measured, request, progress), recipe), Extras()
    from bslora_convert.behaviour.converting import convert_on_base

    made, extras = convert_on_base(session, measured, request, recipe.calibration, files, run)
    return *_nearest(made, recipe), extras


def _nearest(made: Converted, recipe: Recipe) -> tuple[Converted, Recipe]:
    """The recipe as it is recorded: with the error that nobody asked for, or with the nearest one that was reached and a note."""
    allowed, reached = recipe.asked.max_error, made.error
    if recipe.asked.is_given or recipe.calibration.finetune is not None or allowed is None or reached is None:
        return made, recipe
    if reached > allowed:
        note = Note(f"{missed(recipe, reached)}; what comes nearest was written", "attention")
        made = replace(made, notes=(*made.notes, str(note)))
        allowed = min(math.ceil(reached / FINEST_ERROR) * FINEST_ERROR, 1 - FINEST_ERROR)
    return made, recipe.but(max_error=allowed)


def _check_error(recipe: Recipe, adapter: LoraAdapter, error: float) -> None:
    """:raises ThresholdMissed: when the error that was asked for is not reached by what was written."""
    allowed = recipe.asked.max_error if recipe.asked.is_given else None
    if allowed is not None and error > allowed:
        raise ThresholdMissed(missed(recipe, error, fitted=not isinstance(adapter, OfficialSource)))


def missed(recipe: Recipe, error: float, fitted: bool = True) -> str:
    """Why an error was not reached, and what to do. fitted: whether the form was sought, not found in the source."""
    structure, wanted = recipe.structure, f"--max-error {recipe.asked.max_error:g}"
    if recipe.storage.bits is not None:
        return f"{wanted} can't be reached with --bits {recipe.storage.bits} (reached {error:.4g}); raise one of them"
    if fitted and structure.transform in ("ke", "ss", "gt") and structure.max_rank != "none":
        return (
            f"{wanted} can't be reached with --transform {structure.transform} and --max-rank {structure.max_rank} "
            f"(reached {error:.4g}): shared parts take rank from what modules hold for themselves; give --transform auto or "
            "--max-rank none"
        )
    if fitted and is_whole(structure.max_rank):
        return (
            f"{wanted} can't be reached with --max-rank {structure.max_rank} (reached {error:.4g}); raise one of them"
        )
    return (
        f"{wanted} is finer than codes can hold, whose widest are bfloat16 (reached {error:.4g}); for floats give "
        "--budget 1 --dtype float32"
    )
