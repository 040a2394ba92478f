"""A fit in floats, to a size or by given ranks, under one grouping or the best of several."""

import math
from dataclasses import replace

import torch

from bslora_convert.conversion.groups import candidates
from bslora_convert.conversion.request import Converted, Request, cast
from bslora_convert.fit.convert import fit_by_hand, fit_to_budget
from bslora_convert.fit.gain import unbiased
from bslora_convert.fit.source import Fit, Source
from bslora_convert.process.progress import Progress
from bslora_convert.recipe.structure import Structure
from bslora_convert.recipe.target import RankTriple

SAME_ERROR = 1e-3  # relative error under which two fits are equally good and the smaller one is kept


def in_floats(source: Source, request: Request, progress: Progress) -> Converted:
    """The fit in the source's metrics, as it is stored.

    :raises RecipeError: when the size asked for can't be met.
    """
    target = request.target
    size = target.ranks if target.numbers is None else target.numbers
    assert size is not None  # other targets are met in codes
    fit = fit_grouped(source, request.structure, size, request.seed, request.dtype, progress)
    form = unbiased(source, fit.form) if target.unbiased else fit.form
    return Converted(cast(form, request.dtype), notes=fit.notes)


def fit_grouped(
    source: Source, structure: Structure, size: int | RankTriple, seed: int, dtype: torch.dtype, progress: Progress
) -> Fit:
    """The fit under the groups that the structure names, or of several groupings the one that is best for the size.

    size: numbers to store, or ranks by hand.
    """

    def fitted(grouped: Source) -> Fit:
        if isinstance(size, int):
            return fit_to_budget(grouped, structure, size, seed, dtype, progress)
        return fit_by_hand(grouped, structure, size, seed, dtype, progress)

    fits = {
        name: fitted(replace(source, partition=partition))
        for name, partition in candidates(source, structure.groups).items()
    }
    if len(fits) == 1:
        return next(iter(fits.values()))
    allowed = max(min(fit.lost for fit in fits.values()), SAME_ERROR**2 * source.weight)
    best = min((name for name in fits if fits[name].lost <= allowed), key=lambda name: fits[name].form.parameters)
    error = {name: math.sqrt(fit.lost / source.weight) if source.weight else 0.0 for name, fit in fits.items()}
    found = ", ".join(f"{name} {fits[name].form.parameters:,} numbers at {error[name]:.4f}" for name in fits)
    note = f"groups auto compared {found}; {best} kept"
    return replace(fits[best], notes=(*fits[best].notes, note))
