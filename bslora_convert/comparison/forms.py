"""What `compare` fits: the other forms (`baselines`) and BSLoRA's own, by name.

bslora_<t>          transform t, shared and local ranks searched for the budget, as `compress --transform t` does
bslora_<t>_paper    the paper's ranks (section 4.1: SS 2,4,32, GT 2,8,16, KE 2,4,16), at the size that they have
bslora_<t>_intra    one shared pair for each layer and nothing else, of the largest rank that fits: the paper's ablation
bslora_<t>_inter    one pair for all layers and nothing else; the third ablation, local parts only, is `svd_uniform`
svd_int8, svd_int4  truncated SVD in codes of one width, within the bytes that the budget's numbers take
svd_mixed           a width for each side of each component, as `compress --transform none --bytes` does; like the two above
                    against A's random initialisation where the source has it
rtn_int8, nf4, …    other quantisers, of the whole adapter or of its truncated SVD (`baselines.quantised`, `baselines.loraquant`)
…_initial           the same with A's random initialisation known (`baselines.initialised`); an adapter without one has no fit.
                    `compare` makes them by name only
…_unbiased          the same with each module's update scaled to the original's strength (`fit.gain`): the scale goes into numbers
                    that are there anyway, floats or the scales of codes, rounded as these are, and takes no bytes; our codes as
                    compress makes them then, with bits where behaviour is
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from bslora_convert.baselines import BASELINES, QUANTISED, QUANTISED_INITIAL, WHOLE, WHOLE_INITIAL
from bslora_convert.baselines.baseline import Fitted, Fitter, OutOfReach, largest, rounded
from bslora_convert.baselines.initialised import against
from bslora_convert.bslora.form import LEVELS, BsloraForm, Module
from bslora_convert.coding.form import code_form
from bslora_convert.errors import RecipeError
from bslora_convert.fit.convert import fit_by_hand, fit_to_budget
from bslora_convert.fit.gain import Strength
from bslora_convert.fit.parallel import each
from bslora_convert.fit.search import LARGEST_SHARED_RANK, problem_of, shared_parameters
from bslora_convert.fit.source import Source
from bslora_convert.modules.factors import Factors
from bslora_convert.recipe.structure import Structure
from bslora_convert.recipe.target import Target

SUFFIX = "_unbiased"
PAPER = {"ss": (2, 4, 32), "gt": (2, 8, 16), "ke": (2, 4, 16)}


def fitted(form: BsloraForm, storage: torch.dtype) -> Fitted:
    """A BSLoRA form as the comparison takes it, its numbers in the storage dtype."""
    stored = form.to(storage)
    local = {module.local.rank for module in stored.modules.values()}
    settings = {
        "local": next(iter(local)) if len(local) == 1 else f"{min(local)} to {max(local)}",
        **{level: stored.shared_rank(level) for level in LEVELS},
    }
    return Fitted({name: stored.delta(name) for name in stored.modules}, stored.parameters, settings)


def searched(transform: str, source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """Ranks searched within the budget."""
    try:
        return fitted(fit_to_budget(source, Structure(transform), budget, seed).form, storage)
    except RecipeError as error:
        raise OutOfReach(str(error)) from None


def by_paper(transform: str, source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """The paper's ranks, whatever size they have."""
    structure = Structure(transform, local_ranks="uniform")
    try:
        return fitted(fit_by_hand(source, structure, PAPER[transform], seed).form, storage)
    except RecipeError as error:
        raise OutOfReach(str(error)) from None


def one_level(transform: str, level: str, source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """One level's pairs alone."""
    if not source.sharing:
        raise OutOfReach("no module stands in a numbered layer, so nothing is shared")
    structure = Structure(transform, local_ranks="uniform")
    problem = problem_of(source, structure)

    def levels(rank: int) -> dict[str, int]:
        return {name: rank if name == level else 0 for name in LEVELS}

    limit = min(LARGEST_SHARED_RANK, *problem.transform.pair_sizes)
    name = f"bslora_{transform}_{level}"
    rank = largest(lambda tried: shared_parameters(problem, levels(tried)), budget, limit, name)
    ranks = levels(rank)
    return fitted(fit_by_hand(source, structure, (0, ranks["intra"], ranks["inter"]), seed).form, storage)


def coded(width: int | None, strong: bool, source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """Truncated SVD in codes, of one width or of the best ones, of least error or as strong as the original."""
    plain = BsloraForm(
        None, {name: Module(d.shape, d.factors(), {}, source.kind(name)) for name, d in source.deltas.items()}
    )
    target = Target(bytes=storage.itemsize * budget, width=width, unbiased=strong)
    found = code_form(source, plain, target, torch.float32, bits=8 * storage.itemsize * budget)
    form = found.form
    settings = {"bits a number": round(found.bits / max(form.parameters, 1), 2)}
    deltas = {name: form.delta(name) for name in form.modules}
    note = "" if found.initial is None else against(found.initial)
    return Fitted(deltas, form.parameters, settings, bytes=-(-found.bits // 8), note=note)


def as_strong(source: Source, found: Fitted, storage: torch.dtype) -> Fitted:
    """A fit with every module's update scaled to the original's strength."""
    found = found if found.in_full is None else found.in_full()

    def in_floats(name: str, by: float) -> Factors:
        return Factors(rounded(by * found.deltas[name].b, storage), found.deltas[name].a)

    times = found.times or in_floats

    def scaled(name: str) -> Factors:
        scale = Strength.of(source.deltas[name].factors(), found.deltas[name]).scale
        return found.deltas[name] if scale == 1 else times(name, scale)

    return replace(found, deltas=dict(zip(found.deltas, each(scaled, found.deltas), strict=True)))


def unbiased(fit: Fitter, source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """A form with every module's update scaled to the original's strength."""
    return as_strong(source, fit(source, budget, storage, seed), storage)


WIDTHS: Mapping[str, int | None] = {"svd_int8": 8, "svd_int4": 4, "svd_mixed": None}
CODED: Mapping[str, Fitter] = {name: partial(coded, width, False) for name, width in WIDTHS.items()}

BY_FORM = ("svd_uniform", "svd_adaptive", *(f"bslora_{name}" for name in PAPER))  # of floats, those that compress makes

WITHIN_BUDGET: Mapping[str, Fitter] = {
    **BASELINES,
    **{f"bslora_{name}": partial(searched, name) for name in PAPER},
    **{f"bslora_{name}_{level}": partial(one_level, name, level) for name in ("ss", "ke") for level in LEVELS},
}

OF_ONE_SIZE: Mapping[str, Fitter] = {**WHOLE, **WHOLE_INITIAL}
OTHERS: Mapping[str, Fitter] = {**QUANTISED, **QUANTISED_INITIAL, **OF_ONE_SIZE}  # in the codes of other methods

IN_CODES: Mapping[str, Fitter] = {**CODED, **OTHERS}

SCALED: Mapping[str, Fitter] = {
    f"{name}{SUFFIX}": partial(unbiased, {**WITHIN_BUDGET, **OTHERS}[name]) for name in (*BY_FORM, *OTHERS)
}  # what their twins only scale

UNBIASED: Mapping[str, Fitter] = {
    **SCALED,
    **{f"{name}{SUFFIX}": partial(coded, width, True) for name, width in WIDTHS.items()},
}

SEARCHED = {name for form in CODED for name in (form, f"{form}{SUFFIX}")}  # in our codes, which are searched on a CPU

OWN_SIZE: Mapping[str, Fitter] = {
    **{f"bslora_{name}_paper": partial(by_paper, name) for name in PAPER},
    **OF_ONE_SIZE,
    **{f"{name}{SUFFIX}": UNBIASED[f"{name}{SUFFIX}"] for name in OF_ONE_SIZE},
}

FORMS: Mapping[str, Fitter] = {**WITHIN_BUDGET, **IN_CODES, **OWN_SIZE, **UNBIASED}

GIVEN_INITIAL = {name for form in (*QUANTISED_INITIAL, *WHOLE_INITIAL) for name in (form, f"{form}{SUFFIX}")}
USUAL = [name for name in FORMS if name not in GIVEN_INITIAL]  # those that are compared by default
KNOWING = SEARCHED | GIVEN_INITIAL  # those that use A's random initialisation
