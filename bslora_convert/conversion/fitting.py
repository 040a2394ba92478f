"""From a recipe to a fit: in floats or in codes, under one grouping or the best of several, to a size or to an error.

recipe -> fit to a budget, by hand or to an error -> of several groupings the best -> in codes, for bytes or bits
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bslora_convert.bslora.codes.file import EMPTY_CODES, sizes, to_file
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.storage import coded_bytes
from bslora_convert.coding.forecast import Forecast
from bslora_convert.coding.form import Aim, CodedForm, code_form
from bslora_convert.conversion import fidelity
from bslora_convert.conversion.groups import candidates
from bslora_convert.errors import RecipeError
from bslora_convert.fit.convert import Fit, Options, Source, fit_by_hand, fit_to_budget
from bslora_convert.fit.gain import unbiased
from bslora_convert.layers.slots import step_of
from bslora_convert.lora import LoraAdapter
from bslora_convert.notes import Note
from bslora_convert.process.progress import Progress, silent
from bslora_convert.recipe.checks import is_whole
from bslora_convert.recipe.recipe import Recipe

TYPICAL_WIDTH = 4  # bits a number that a byte budget ends at, roughly
SAME_ERROR = 1e-3  # relative error under which two fits are equally good and the smaller one is kept
ERROR_ATTEMPTS = 4
HEAD_START = 0.985  # of the energy that may be lost: where the first attempt is aimed at, as codes lose what their widths promise
LEAST_BUDGET = 0.02  # of the parameters, for a float fit that only seeks shared parts
WORTH_CODING = 0.02  # of what plain components of as many numbers lose: what sharing must gain to be coded too
ROOM_ATTEMPTS = 6
ROOM_LEFT, LEAST_LEFT = 0.005, 16  # share of the bytes, and bytes, that may stay unused
FINEST_ERROR = 1e-4  # to which an error that could be had is recorded
AIMED = 0.99  # of the energy that may be lost: where the next attempt is aimed at
LEAST_SLOPE, LARGEST_STEP = 0.1, 4.0  # of what is lost against what was to be lost; of what is to be lost, downwards
FINER = (0.9, 0.75, 0.5, 0.25)  # of what was to be lost, where no attempt kept to what is allowed
NEAR_LEAST = 1.02  # times the least error that a form can have: what will do where the error was not asked for
CLOSE = 0.97  # share of the energy that may be lost which is worth no further attempt


@dataclass(frozen=True, slots=True)
class Stored:
    """A fit as it is going to be stored: the form in its storage dtype, the file's codes that it was decoded from, if any.

    recipe: what it was made by, with the error that could be had where the one that nobody asked for could not.
    """

    form: BsloraForm
    codes: Mapping[str, Tensor]
    recipe: Recipe
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, fit: Fit, dtype: torch.dtype, recipe: Recipe, codes: Mapping[str, Tensor] | None = None) -> "Stored":
        """:raises RecipeError: when a number is too large for the dtype."""
        return cls(cast(fit.form, dtype), codes or {}, recipe, fit.notes)


def fit_stored(
    source: Source, recipe: Recipe, dtype: torch.dtype, adapter: LoraAdapter, progress: Progress = silent
) -> Stored:
    """The fit in the source's metrics, in codes where the recipe asks for them.

    :raises RecipeError: when the size asked for can't be met.
    """
    if not recipe.is_coded:
        fit = _fit_grouped(source, recipe, dtype, _named("fitting", progress))
        if recipe.storage.is_unbiased:
            fit = replace(fit, form=unbiased(source, fit.form))
        return Stored.of(fit, dtype, recipe)
    room = None
    if recipe.aim.bytes is not None:
        size = adapter.weights.stat().st_size
        room = Room(math.floor(recipe.aim.bytes * size), adapter.carried)
        if room.most <= 0:
            raise RecipeError(
                f"bytes is {recipe.aim.bytes:g}: of the source's {size:,} bytes that leaves no room for codes beside the header"
                f"{' and the tensors carried along' if adapter.carried else ''}",
                "bytes",
            )
    found: list[tuple[Fit, CodedForm]] = []
    refused: RecipeError | None = None
    plain: Fit | None = None
    for candidate in by_name(recipe):
        try:
            said = _named(f"fitting {candidate.form.transform}", progress)
            fit = _float_for_codes(source, candidate, adapter.weights.stat().st_size, adapter.dtype, said)
            if plain is not None and (not fit.form.shared or fit.lost > (1 - WORTH_CODING) * plain.lost):
                continue
            plain = fit if candidate.form.transform == "none" else plain
            make = partial(_coded, source, fit.form, candidate, dtype=dtype, progress=progress)
            if room is None:
                found.append((fit, make(None, "")))
            else:
                sized = room.filled(partial(make, hollow=True))
                found.append((fit, room.filled(make, -(-sized.bits // 8))))
        except RecipeError as error:
            refused = error  # of several transforms another may fit
    if not found:
        assert refused is not None  # there is a transform
        raise refused
    wanted = None if recipe.aim.max_error is None else recipe.aim.max_error**2 * source.energy

    lost = [_lost(source, coded) if wanted is not None else 0.0 for _, coded in found]

    def rank(at: int) -> tuple[bool, float, float]:
        coded = found[at][1]
        if wanted is not None and lost[at] <= wanted:
            return False, coded.bits, coded.lost
        return True, coded.lost, coded.bits

    best = min(range(len(found)), key=rank)
    (fit, coded), notes = found[best], found[best][0].notes
    if not recipe.aim.asked:  # what is recorded asks for it
        assert wanted is not None  # that is the default
        allowed = recipe.aim.max_error
        if lost[best] > wanted:
            reached = math.sqrt(lost[best] / source.energy)
            notes = (
                *notes,
                str(Note(f"{missed(recipe, reached, fitted=True)}; what comes nearest was written", "attention")),
            )
            allowed = min(math.ceil(reached / FINEST_ERROR) * FINEST_ERROR, 1 - FINEST_ERROR)
        recipe = recipe.but(max_error=allowed)
    return Stored.of(replace(fit, form=coded.form, notes=notes), dtype, recipe, to_file(coded.tensors))


def _lost(source: Source, coded: CodedForm) -> float:
    """Σ ‖ΔW − ΔŴ‖², plainly."""
    return fidelity.compare(source, coded.form).relative_error ** 2 * source.energy


@dataclass(frozen=True, slots=True)
class Room:
    """What a weight file of at most `allowed` bytes has room for beside its header and the tensors carried along."""

    allowed: int
    carried: Mapping[str, Tensor]

    @property
    def most(self) -> int:
        """Bytes of codes that fit where all of them are of one width."""
        return self.allowed - coded_bytes(EMPTY_CODES, self.carried)

    def filled(self, coded: Callable[[int, str], CodedForm], room: int | None = None) -> CodedForm:
        """The codes that lose least of those whose file fits. coded: makes codes of at most so many bytes, and names the attempt.

        room: bytes to begin with. How long the header is follows from the codes: what they leave or lack is given or taken, and
        they are made anew.

        :raises RecipeError: where none fit.
        """
        room, best, before = self.most if room is None else room, None, -1
        refused = RecipeError(
            f"bytes: {self.allowed:,} bytes can't hold the header and any codes; raise bytes", "bytes"
        )
        for attempt in range(1, ROOM_ATTEMPTS + 1):
            try:
                found = coded(room, f", attempt {attempt}" if attempt > 1 else "")
            except RecipeError as error:
                refused = error
                break
            left = self.allowed - coded_bytes(sizes(found.tensors), self.carried)
            if left >= 0 and (best is None or found.lost < best.lost):
                best = found
            if 0 <= left <= max(ROOM_LEFT * self.allowed, LEAST_LEFT) or (left >= 0 and found.bits == before):
                break
            before = found.bits
            room = room + left if left > 0 else found.bits // 8 + left - LEAST_LEFT // 2
        if best is None:
            raise refused
        return best


def _named(phase: str, progress: Progress) -> Callable[[str], None]:
    """Steps that nobody can count beforehand, as words of a phase."""
    return lambda step: progress(phase, words=step)


def by_name(recipe: Recipe) -> list[Recipe]:
    """The recipe for each transform that it may take; settings that mean nothing to one are left out there."""
    if recipe.form.transform != "auto":
        return [recipe]
    apart: dict[str, dict[str, Any]] = {
        "none": {"groups": "layer", "shared_size": None, "min_shared": 0, "slice": "center", "kernel": "r_1"},
        "ke": {"slice": "center"},
        "ss": {"shared_size": None, "kernel": "r_1"},
    }
    return [recipe.but(transform=name, **fields) for name, fields in apart.items()]


def _float_for_codes(
    source: Source, recipe: Recipe, size: int, dtype: torch.dtype, progress: Callable[[str], None]
) -> Fit:
    """A fit in float32 whose shared parts suit codes; where precision is chosen too, of as many numbers as few bits each allow.

    size: of the source's file, in bytes. dtype: of its numbers.
    """
    aim = recipe.aim
    if aim.chooses_precision:
        share = aim.bytes
        if aim.max_error is not None:
            expected = Forecast.of(source.plain.spectra, source.shapes).bits_for(aim.max_error**2 * source.energy)
            share = expected / 8 / size
        assert share is not None  # one of the two is given
        budget = share * 8 * dtype.itemsize / TYPICAL_WIDTH
        recipe = recipe.but(bytes=None, max_error=None, budget=min(1.0, max(budget, LEAST_BUDGET)))
    try:
        return _fit_grouped(source, recipe, torch.float32, progress, hollow=aim.chooses_precision)
    except RecipeError as error:  # the shared parts alone are more than that; an error has no size to keep to
        if aim.max_error is None or "budget" not in error.fields:
            raise
        return _fit_grouped(source, recipe.but(budget=1.0), torch.float32, progress)


def _coded(
    source: Source,
    form: BsloraForm,
    recipe: Recipe,
    room: int | None,
    words: str,
    *,
    dtype: torch.dtype,
    progress: Progress,
    hollow: bool = False,
) -> CodedForm:
    """The form in codes; for an error, the fewest bits whose result still has it once written. words: of progress.

    hollow: its widths alone.
    """
    phase = f"{'sizing' if hollow else 'coding'} {recipe.form.transform}{words}"
    aim = Aim(
        bits=None if room is None else 8 * room,
        width=recipe.storage.bits,
        most_rank=_most_rank(source, recipe),
        unbiased=recipe.storage.is_unbiased,
        hollow=hollow,
    )
    if recipe.aim.max_error is None:
        ranks = None if room is not None else {name: module.local.rank for name, module in form.modules.items()}
        return code_form(
            source,
            form,
            replace(aim, ranks=ranks),
            dtype,
            lambda _, done=0, total=0, words="": progress(phase, done, total),
        )
    attempt = 0

    def make(lost: float) -> tuple[CodedForm, float]:
        nonlocal attempt
        attempt += 1

        def tried(_: str, /, done: int = 0, total: int = 0, words: str = "") -> None:
            progress(f"{phase}, attempt {attempt}", done, total)

        coded = code_form(source, form, replace(aim, lost=lost), dtype, tried)
        return coded, _lost(source, coded)

    def start(share: float) -> float:
        if aim.unbiased:
            share /= 1 + share  # of the lost share q a scale of 1 / (1 − q) makes q / (1 − q)
        return HEAD_START * share * source.weight  # an error is plain, what is to be lost is in the metric

    share = recipe.aim.max_error**2
    coded, reached = _fewest_bits(make, share * source.energy, start(share))
    if recipe.aim.asked or reached <= share * source.energy:
        return coded
    share = max(NEAR_LEAST**2 * make(0.0)[1] / source.energy, share)
    return _fewest_bits(make, share * source.energy, start(share))[0]


def _fewest_bits(
    make: Callable[[float], tuple[CodedForm, float]], allowed: float, start: float
) -> tuple[CodedForm, float]:
    """The codes of fewest bits that lose at most `allowed`, and what they lose; the nearest ones where none do.

    make: codes that should lose so much, with what they do lose. It differs from what was asked for, as refits gain on what the
    widths promise, rounding loses and some of it no width can keep: so the line through the last two attempts is followed.
    start: the first attempt.
    """
    lost = start
    tried: list[tuple[float, float, int]] = []
    best: tuple[CodedForm, float] | None = None
    for _ in range(ERROR_ATTEMPTS):
        found = coded, reached = make(lost)
        better = best is None or (coded.bits < best[0].bits if best[1] <= allowed else reached < best[1])
        if better and (reached <= allowed or best is None or best[1] > allowed):
            best = found
        if CLOSE * allowed <= reached <= allowed or reached == 0 or any(coded.bits == bits for _, _, bits in tried):
            break
        tried.append((lost, reached, coded.bits))
        slope = reached / lost
        if len(tried) > 1:
            (a, at_a, _), (b, at_b, _) = tried[-2:]
            slope = max((at_b - at_a) / (b - a), LEAST_SLOPE * slope)
        lost = max(lost + (AIMED * allowed - reached) / slope, lost / LARGEST_STEP)
    assert best is not None  # there was an attempt
    return best if best[1] <= allowed else _finer(make, allowed, lost, best)


def _finer(
    make: Callable[[float], tuple[CodedForm, float]], allowed: float, lost: float, nearest: tuple[CodedForm, float]
) -> tuple[CodedForm, float]:
    """What loses at most `allowed` where the attempts around it don't, as with the few sizes of small adapters.

    lost: where the last attempt was aimed at. nearest: what is left where not even the finest codes reach it.
    """
    finest = make(0.0)
    if finest[1] > allowed:
        return nearest
    for step in FINER:
        found = make(lost * step)
        if found[1] <= allowed:
            return found
    return finest


def _most_rank(source: Source, recipe: Recipe) -> int | None:
    """Greatest rank that a module may have: as asked for, or the slot that a server keeps for the source."""
    most = recipe.form.max_rank
    if most == "slot":
        return step_of(max(delta.rank for delta in source.deltas.values()))
    return most if isinstance(most, int) else None


def _fit_grouped(
    source: Source, recipe: Recipe, dtype: torch.dtype, progress: Callable[[str], None], hollow: bool = False
) -> Fit:
    """The fit under the groups that the recipe names, or of several groupings the one that is best for the size asked for.

    hollow: as of `Options`.
    """
    fits = {
        name: _fit(replace(source, partition=partition), recipe, dtype, progress, hollow)
        for name, partition in candidates(source, recipe.form.groups).items()
    }
    if len(fits) == 1:
        return next(iter(fits.values()))
    allowed = max(min(fit.lost for fit in fits.values()), SAME_ERROR**2 * source.weight)
    best = min((name for name in fits if fits[name].lost <= allowed), key=lambda name: fits[name].form.parameters)
    error = {name: math.sqrt(fit.lost / source.weight) if source.weight else 0.0 for name, fit in fits.items()}
    found = ", ".join(f"{name} {fits[name].form.parameters:,} numbers at {error[name]:.4f}" for name in fits)
    note = f"groups auto compared {found}; {best} kept"
    return replace(fits[best], notes=(*fits[best].notes, note))


def _fit(source: Source, recipe: Recipe, dtype: torch.dtype, progress: Callable[[str], None], hollow: bool) -> Fit:
    options = Options(
        transform=recipe.form.transform,
        shared_size=recipe.form.shared_size,
        window=recipe.form.slice,
        kernel=recipe.form.kernel,
        min_shared=recipe.form.min_shared or 0,
        uniform=recipe.is_uniform,
        most_rank=_most_rank(source, recipe),
        seed=recipe.seed,
        storage=dtype,
        hollow=hollow,
    )
    if recipe.aim.ranks is not None:
        return fit_by_hand(source, options, recipe.aim.ranks, progress)
    assert recipe.aim.budget is not None  # Recipe sees to it
    return fit_to_budget(source, options, math.floor(recipe.aim.budget * source.parameters), progress)


def cast(form: BsloraForm, dtype: torch.dtype) -> BsloraForm:
    """The form in its storage dtype.

    :raises RecipeError: when a number is too large for it.
    """
    cast = form.to(dtype)
    if dtype == torch.float16 and not all(bool(tensor.isfinite().all()) for tensor in cast.tensors()):
        raise RecipeError("dtype float16 can't hold some of the numbers; bfloat16 and float32 can", "dtype")
    return cast


def missed(recipe: Recipe, error: float, fitted: bool) -> str:
    """Why an error was not reached, and what to do. fitted: whether the form was sought, not found in the source."""
    wanted = f"--max-error {recipe.aim.max_error:g}"
    if recipe.storage.bits is not None:
        return f"{wanted} can't be reached with --bits {recipe.storage.bits} (reached {error:.4g}); raise one of them"
    if fitted and recipe.form.transform in ("ke", "ss", "gt") and recipe.form.max_rank != "none":
        return (
            f"{wanted} can't be reached with --transform {recipe.form.transform} and --max-rank {recipe.form.max_rank} "
            f"(reached {error:.4g}): shared parts take rank from what modules hold for themselves; give --transform auto or "
            "--max-rank none"
        )
    if fitted and is_whole(recipe.form.max_rank):
        return (
            f"{wanted} can't be reached with --max-rank {recipe.form.max_rank} (reached {error:.4g}); raise one of them"
        )
    return (
        f"{wanted} is finer than codes can hold, whose widest are bfloat16 (reached {error:.4g}); for floats give "
        "--budget 1 --dtype float32"
    )
