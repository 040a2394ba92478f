"""A conversion on its base model: in the best metric of its prompts, to the behaviour asked for, distilled."""

from collections.abc import Mapping
from dataclasses import replace

from bslora_convert.behaviour.distill import Distilled, distill
from bslora_convert.behaviour.evaluator import Evaluator
from bslora_convert.behaviour.prompts import Prompts
from bslora_convert.behaviour.reaching import Distil, convert_to_behaviour
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.behaviour.split import RowSplit, split_rows
from bslora_convert.behaviour.training_rows import TrainingRows, TrainingRun
from bslora_convert.conversion.convert import convert
from bslora_convert.conversion.request import Converted, Request
from bslora_convert.conversion.writing import Extras
from bslora_convert.fit.source import Source
from bslora_convert.recipe.calibration import Calibration
from bslora_convert.results.adapter import EvidenceRecord


def convert_on_base(
    session: BaseModelSession, source: Source, request: Request, calibration: Calibration, files: Mapping[str, Prompts],
    run: TrainingRun,
) -> tuple[Converted, Extras]:  # fmt: skip
    """What the request asks for, and the records of how it came about.

    files: the rows of every prompt file that `calibration` names, by option. run: how to distil, where that is asked for.

    :raises ThresholdMissed: when a behaviour is not reached. :raises RecipeError: when a size can't be met.
    :raises InputError: when there are too few rows.
    """
    split = split_rows(session, files["prompts"], request.seed, run.writing) if "prompts" in files else None
    distil = _distillation(session, split, calibration, files, run)
    if split is None:
        made = convert(source, request, session.progress)
        return (made, Extras()) if distil is None else _trained(made, distil(made), Extras())
    evaluator = Evaluator(session, split, source, calibration.metric, request.seed)
    if request.target.measure is not None:
        return _of_behaviour(evaluator, request, distil)
    best = evaluator.best(request)
    result, extras = best.converted, Extras(notes=(*split.notes, *best.notes))
    if distil is not None:
        result, extras = _trained(result, distil(result), extras)
    evidence = EvidenceRecord(rows=split.counts, metric=best.metric, proof=evaluator.proof(result.form))
    return result, replace(extras, evidence=evidence)


def _distillation(
    session: BaseModelSession,
    split: RowSplit | None,
    calibration: Calibration,
    files: Mapping[str, Prompts],
    run: TrainingRun,
) -> Distil | None:
    """What trains a conversion, on a file or on the rows of `prompts`; None where nobody asks for it."""
    if calibration.finetune is None:
        return None

    def distil(made: Converted) -> Distilled:
        if split is not None and "finetune" not in files:
            rows = TrainingRows.of_split(split)
        else:
            rows = TrainingRows.of_files(session, files["finetune"], None, run)
        return distill(session, made, rows, run)

    return distil


def _of_behaviour(evaluator: Evaluator, request: Request, distil: Distil | None) -> tuple[Converted, Extras]:
    """The smallest conversion of the behaviour that is asked for."""
    found = convert_to_behaviour(evaluator, request, distil)
    split = evaluator.split
    evidence = EvidenceRecord(rows=split.counts, metric=found.chosen.metric, proof=found.record.proofs[-1])
    extras = Extras(evidence=evidence, aim=found.record, notes=(*split.notes, *found.chosen.notes, *found.notes))
    if isinstance(found.made, Distilled):
        return _trained(found.chosen.converted, found.made, extras)
    return found.made, extras


def _trained(start: Converted, done: Distilled, extras: Extras) -> tuple[Converted, Extras]:
    """A conversion as it was distilled, and the records with the training's own."""
    extras = replace(extras, training=done.record, log=done.log, notes=(*extras.notes, *done.notes))
    return replace(start, form=done.form, codes=done.codes), extras
