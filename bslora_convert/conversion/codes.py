"""A fit in codes: shared parts are sought in floats, then everything is coded, to a size or to an error (`solve`)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from bslora_convert.bslora.codes.coded import Vector, bits_in, vectors_of
from bslora_convert.bslora.codes.file import EMPTY_CODES, sizes, to_file
from bslora_convert.bslora.storage import coded_bytes
from bslora_convert.coding.components import Components
from bslora_convert.coding.forecast import Forecast
from bslora_convert.coding.form import CodedForm, Counter, code_form
from bslora_convert.coding.plan import plan
from bslora_convert.conversion import fidelity
from bslora_convert.conversion.floats import fit_grouped
from bslora_convert.conversion.request import Converted, Request, cast
from bslora_convert.conversion.solve import BYTES, ERROR, Made, Search, Trial, solve_size
from bslora_convert.errors import RecipeError
from bslora_convert.fit.convert import outline, shares
from bslora_convert.fit.source import Fit, Source
from bslora_convert.process.progress import Progress
from bslora_convert.recipe.structure import Structure

HEAD_START = 0.985  # of the energy that may be lost: where the first attempt is aimed at, as codes lose what their widths promise
TYPICAL_WIDTH = 4  # bits a number that a byte budget ends at, roughly
LEAST_SHARE = 0.02  # of the LoRA's numbers, for a float fit that only seeks shared parts
LOOKED_AT = 5  # one in so many layers
WORTH_CODING = 0.02  # of what plain components of as many numbers lose: what sharing must gain to be coded too
SLACK = 4  # bytes that are left free when codes are made smaller: names of widths in the header come and go
FINEST = 1e-12  # of the energy: what the most precise codes are asked to lose
LEAST_SLOPE, LARGEST_STEP = 0.1, 4.0  # of what is lost against what was to be lost; of what is to be lost, downwards
NEAREST = 1.02  # times the least error that a form can have: what will do where the error was not asked for


@dataclass(frozen=True, slots=True)
class Candidate:
    """A coded form, what it loses in plain energy (0 where nobody asks), and notes on how it was fitted."""

    coded: CodedForm
    lost: float
    notes: tuple[str, ...]


def in_codes(source: Source, request: Request, progress: Progress) -> Converted:
    """The best form over the transforms that the structure allows: smallest at an error, of least loss at a size.

    :raises RecipeError: when no transform meets the size asked for.
    """
    target = request.target
    numbers = _numbers(source, request)
    found: list[Candidate] = []
    refused: RecipeError | None = None
    plain: Fit | None = None
    for structure in _structures(source, request):
        try:
            if plain is not None and not _may_pay(source, structure, request, numbers, progress):
                continue
            fit = _float_fit(source, structure, request, numbers, progress)
            if plain is not None and (not fit.form.shared or fit.lost > (1 - WORTH_CODING) * plain.lost):
                continue
            plain = fit if structure.transform == "none" else plain
            coded, lost = _Coder(source, fit, request, structure.transform, progress).towards_target()
            found.append(Candidate(coded, lost, fit.notes))
        except RecipeError as error:
            refused = error  # of several transforms another may fit
    if not found:
        assert refused is not None  # there is a transform
        raise refused
    allowed = target.error**2 * source.energy if target.error is not None else -1.0

    def rank(one: Candidate) -> tuple[bool, float, float]:
        if one.lost <= allowed:
            return False, one.coded.bits, one.coded.lost
        return True, one.coded.lost, one.coded.bits

    best = min(found, key=rank)
    reached = math.sqrt(best.lost / source.energy) if source.energy else 0.0
    codes = to_file(best.coded.tensors)
    form = cast(best.coded.form, request.dtype)
    return Converted(form, codes, best.notes, reached if target.error is not None else None, best.coded.initial)


def _may_pay(source: Source, structure: Structure, request: Request, numbers: int, progress: Progress) -> bool:
    """Whether sharing may gain what is asked of it, by a fit of some layers alone, which is a fifth of the work."""
    part = None if request.target.ranks is not None else source.some_layers(LOOKED_AT)
    if part is None or not shares(part, structure):
        return True
    size = math.floor(numbers * part.parameters / source.parameters)
    try:
        plain = outline(part, replace(structure, transform="none"), size)
        found = _float_fit(part, structure, request, size, progress)
    except RecipeError:  # what the whole adapter may hold
        return True
    return found.lost <= (1 - WORTH_CODING / 2) * plain.lost


def _structures(source: Source, request: Request) -> list[Structure]:
    """What may be taken; ranks by hand that name shared parts leave no choice about having them."""
    ranks, found = request.target.ranks, request.structure.each()
    if len(found) > 1 and ranks is not None and any(ranks[1:]) and source.sharing:
        return [one for one in found if one.transform != "none"]
    return found


def _numbers(source: Source, request: Request) -> int:
    """Numbers of a float fit whose shared parts suit codes: as many as the target's share of the file holds at few bits each."""
    target = request.target
    if target.error is not None:
        expected = Forecast.of(source.plain.spectra, source.shapes).bits_for(target.error**2 * source.energy)
        share = expected / 8 / request.source_bytes
    elif target.bytes is not None:
        share = target.bytes / request.source_bytes
    else:
        return target.numbers or 0
    width = 8 * request.source_dtype.itemsize
    return math.floor(min(max(share * width / TYPICAL_WIDTH, LEAST_SHARE), 1.0) * source.parameters)


def _float_fit(source: Source, structure: Structure, request: Request, numbers: int, progress: Progress) -> Fit:
    """A fit in float32 whose shared parts are to be coded; local parts only where their ranks are given."""
    target = request.target
    if target.chooses_ranks and not shares(source, structure):
        return outline(source, structure, numbers)
    size = numbers if target.ranks is None else target.ranks
    try:
        return fit_grouped(source, structure, size, request.seed, torch.float32, progress)
    except RecipeError as error:  # the shared parts alone are more than that; an error has no size to keep to
        if target.error is None or "budget" not in error.fields:
            raise
        return fit_grouped(source, structure, source.parameters, request.seed, torch.float32, progress)


class _Coder:
    """Codes one fit towards a target, again and again under other limits: what it is made of is looked at once."""

    def __init__(self, source: Source, fit: Fit, request: Request, transform: str, progress: Progress) -> None:
        self.source, self.form, self.request = source, fit.form, request
        self.transform, self.progress, self.attempts = transform, progress, 0
        counted = Counter(self._said, len(fit.form.modules))
        self.components = Components.of(source, fit.form, request.target, counted)

    def _said(self, _: str, /, done: int = 0, total: int = 0, words: str = "") -> None:
        attempt = f", attempt {self.attempts}" if self.attempts > 1 else ""
        self.progress(f"{'coding' if self.attempts else 'measuring'} {self.transform}{attempt}", done, total, words)

    def code(self, bits: int | None = None, lost: float | None = None) -> CodedForm:
        """The codes within so many bits, or of so much energy lost."""
        self.attempts += 1
        return code_form(
            self.source, self.form, self.request.target, self.request.dtype,
            bits=bits, lost=lost, components=self.components, progress=self._said,
        )  # fmt: skip

    def towards_target(self) -> tuple[CodedForm, float]:
        """The codes that the target asks for, and what they lose in plain energy; 0 where it is no error.

        :raises RecipeError: when none fit in the target's bytes.
        """
        target = self.request.target
        if target.error is not None:
            return self._to_error(target.error)
        return (self.code() if target.bytes is None else self._to_bytes(target.bytes)), 0.0

    def _to_bytes(self, allowed: int) -> CodedForm:
        """The codes of least loss whose file takes at most `allowed` bytes.

        How long the header is follows from the widths: they are planned until the file fits, and only then is anything coded.
        """
        carried = self.request.carried
        room = allowed - coded_bytes(EMPTY_CODES, carried)
        if room <= 0:
            beside = " and the tensors carried along" if carried else ""
            whole = f"{allowed:,} of the source's {self.request.source_bytes:,} bytes"
            raise RecipeError(f"bytes: {whole} leave no room for codes beside the header{beside}", "bytes")

        def trial(setting: float, lost: float, made: Made, vectors: Sequence[Vector]) -> Trial[Made]:
            return Trial(setting, coded_bytes(sizes(vectors), carried), lost, made)

        def planned(setting: float) -> Trial[int]:
            found = plan(self.components, bits=8 * round(1 / setting))
            return trial(setting, found.lost, bits_in(found.vectors), found.vectors)

        def coded(setting: float) -> Trial[CodedForm]:
            found = self.code(bits=8 * round(1 / setting))
            return trial(setting, found.lost, found, vectors_of(found.tensors.values()))

        def follow(taken: int, last: Trial[Any], wanted: float) -> float:
            room = taken // 8 if last.value > wanted else round(1 / last.setting)
            return 1 / max(room + wanted - last.value - SLACK * (last.value > wanted), 1)

        sized = solve_size(
            planned, allowed, 1 / room, lambda known, wanted: follow(known[-1].made, known[-1], wanted), BYTES
        ).best
        if sized is not None:
            first = 1 / max(-(-sized.made // 8), 1)
            found = solve_size(
                coded, allowed, first, lambda known, wanted: follow(known[-1].made.bits, known[-1], wanted), BYTES
            )
            if found.best is not None:
                return found.best.made
        raise RecipeError(f"bytes: {allowed:,} bytes can't hold the header and any codes; raise bytes", "bytes")

    def _to_error(self, error: float) -> tuple[CodedForm, float]:
        """The fewest bits that have an error once they are written, and the plain energy lost; the nearest where none have it.

        What is lost differs from what was to be lost, as refits gain on what the widths promise and rounding loses.
        """
        energy = self.source.energy

        def trial(setting: float) -> Trial[CodedForm]:
            coded = self.code(lost=1 / setting)
            kept = fidelity.compare(self.source, coded.form)
            return Trial(setting, kept.relative_error**2 * energy, coded.bits, coded)

        def search(allowed: float) -> Search[CodedForm]:
            share = allowed / energy
            if self.request.target.unbiased:
                share /= 1 + share  # of the lost share q a scale of 1 / (1 − q) makes q / (1 − q)
            first = 1 / (
                HEAD_START * share * self.source.weight
            )  # an error is plain, what is to be lost is in the metric
            return solve_size(trial, allowed, first, _follow_lost, ERROR, (0.0, 1 / (FINEST * self.source.weight)))

        if not energy:
            return self.code(lost=0.0), 0.0
        found = search(error**2 * energy)
        if found.best is None and self.request.target.or_nearest:
            least = min(one.value for one in found.trials)
            found = search(NEAREST**2 * least)
        best = found.best or min(found.trials, key=lambda one: one.value)
        return best.made, best.value


def _follow_lost(known: Sequence[Trial[CodedForm]], wanted: float) -> float:
    """What is lost goes with what was to be lost; where some of it no width can keep, by the line through the last two trials."""
    last = known[-1]
    slope, lost = last.value * last.setting, 1 / last.setting
    if slope <= 0:  # nothing is lost: less precise codes may do as well
        return last.setting / LARGEST_STEP
    if len(known) > 1:
        rise, run = last.value - known[-2].value, lost - 1 / known[-2].setting
        slope = max(rise / run, LEAST_SLOPE * slope)
    return 1 / max(lost + (wanted - last.value) / slope, lost / LARGEST_STEP)
