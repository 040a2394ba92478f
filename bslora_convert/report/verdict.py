"""The result in plain words: what was kept, at what size, and whether sharing paid."""

import math
from collections.abc import Callable, Sequence

from bslora_convert.behaviour.intervals import too_few
from bslora_convert.files.record import named
from bslora_convert.notes import Note
from bslora_convert.recipe.measures import KL, MEASURES
from bslora_convert.results.adapter import (
    CodingRecord,
    EvidenceRecord,
    Fidelity,
    ModuleRecord,
    TrainingRecord,
    WeightRecord,
)
from bslora_convert.results.behaviour import Verification

GONE = 1e-6  # of relative error below one
NAMED = 3  # modules that a sentence names
NOTED = 0.02  # of a weight file's bytes, from which on the configuration's are told
EVEN = 0.002  # of a gain: as far as rounding moves it
TIE = 0.002  # relative difference of errors under which two results are called equal


def _nats(value: float) -> str:
    return f"{value:.4g} nats a token"


def _share(value: float) -> str:
    return f"{100 * value:.5g}%"


SHOWN: dict[str, Callable[[float], str]] = {
    KL.option: _nats
}  # how a measure's values are written, where they are no shares


def sentences(record: Fidelity) -> list[str]:
    """The few sentences that answer what a reader asks first: whether it does what was asked for, what it kept."""
    compact, weight = record.compact, record.weight
    if record.deduplication is not None:
        return [_deduplicated(record, record.deduplication["copied_parameters"])]
    if not weight.energy:
        return [
            "The update of the source is zero everywhere, so there is nothing to keep: the result "
            f"({compact.byte_ratio:.1%} of the bytes) does nothing either."
        ]
    kept = weight.cosine**2 if is_unbiased(record) else weight.energy_kept  # without what the scale adds
    said = [
        *reached(record),
        f"Keeps {kept:.1%} of the update's energy in {compact.parameter_ratio:.1%} of the parameters "
        f"({compact.byte_ratio:.1%} of the bytes{_with_configuration(record)}).",
    ]
    svd = rival_error(record)
    if _fitted_to_behaviour(record):
        said.append(
            f"It was fitted to what the base model does with it, not to the weights, so its relative error "
            f"({weight.relative_error:.4f}; plain SVD of this size {svd:.4f}) is no "
            "measure of it; `verify` is."
        )
    elif record.coding is not None:
        said.append(_in_codes(record, record.coding))
        said += _initialised(record)
    else:
        said.append(_against_svd(compact.transform, weight.relative_error, svd))
    said.append(_strength(weight))
    said += _left_out(weight.modules)
    before = record.source.largest_rank
    if compact.expanded_rank > before:
        said.append(
            f"Expanded, its largest rank is {compact.expanded_rank}, more than the source's {before}: smaller on disk, "
            "not in a server's slots."
        )
    return said


def _with_configuration(record: Fidelity) -> str:
    """What the configuration adds to the share of the bytes, where that is much of the result."""
    compact, source = record.compact, record.source
    if (compact.config_bytes or 0) <= NOTED * compact.bytes:
        return ""
    return f", {(compact.bytes + (compact.config_bytes or 0)) / source.bytes:.1%} with its configuration"


def is_unbiased(record: Fidelity) -> bool:
    """Whether the updates were scaled to the original's strength."""
    return record.deduplication is None and record.recipe.get("gain", "least-squares") != "least-squares"


def rival_error(record: Fidelity, baseline: str = "svd_adaptive") -> float:
    """The error of plain SVD of this size, unbiased where the result is: like beside like."""
    found = record.baselines[baseline]
    return found.unbiased_error if is_unbiased(record) else found.relative_error


def _strength(weight: WeightRecord) -> str:
    """The error in its two parts: ΔŴ = γ ΔW + noise, the noise at right angles to ΔW."""
    gain = weight.gain
    noise = math.sqrt(max(weight.relative_error**2 - (1 - gain) ** 2, 0.0))
    strong = "as strong as the original" if abs(gain - 1) < EVEN else f"{gain:.3f} times as strong as the original"
    return f"Along the original's updates it is {strong} (gain {gain:.4f}); the noise beside them is {noise:.4f} of their norm."


def without_gain(record: Fidelity) -> str | None:
    """Why a result is of no use to anyone, None where it may be of use."""
    compact, weight = record.compact, record.weight
    if compact.byte_ratio >= 1:
        return (
            f"nothing was gained: the result takes {compact.bytes:,} bytes, {compact.byte_ratio:.0%} of the source's; ask "
            "for less (--bytes, --budget, --ranks), or keep the source"
        )
    if weight.energy and weight.relative_error >= 1 > EVEN > weight.gain:
        return "nothing was kept: at this size no part of the update fits; ask for more (--bytes, --budget, --ranks)"
    return None


def _left_out(modules: Sequence[ModuleRecord]) -> list[str]:
    """Modules of which nothing is left, in a sentence."""
    gone = [m for m in modules if m.energy and not m.local_rank and m.relative_error >= 1 - GONE]
    if not gone:
        return []
    share = sum(m.energy for m in gone) / sum(m.energy for m in modules)
    are = "is" if len(gone) == 1 else "are"
    return [
        f"{len(gone)} of {len(modules)} modules {are} left out whole, with {share:.2%} of the update's energy: "
        f"{named([m.name for m in gone], NAMED)}."
    ]


def _fitted_to_behaviour(record: Fidelity) -> bool:
    evidence, training = record.evidence, record.training
    return bool((evidence and evidence.metric.kept != "plain") or (training and training.kept_step))


def _deduplicated(record: Fidelity, copies: int) -> str:
    compact, weight = record.compact, record.weight
    return (
        f"Nothing was fitted: of the source's {record.source.parameters:,} numbers {copies:,} were copies of shared ones, and "
        f"each stands here once ({compact.byte_ratio:.1%} of the bytes, relative error {weight.relative_error:.2g}; "
        f"plain SVD of this size {record.baselines['svd_adaptive'].relative_error:.4f})."
    )


def _in_codes(record: Fidelity, coding: CodingRecord) -> str:
    likewise = ", made as strong as the original too," if is_unbiased(record) else ""
    said = (
        f"In codes of {coding.bits_per_number:.1f} bits a number; plain SVD of as many bytes in the storage dtype{likewise} has "
        f"the relative error {rival_error(record):.4f} against {record.weight.relative_error:.4f}."
    )
    if (
        record.recipe.get("bytes") is None or coding.bound is None
    ):  # where ranks and width were given, nobody aimed at the bound
        return said
    return (
        f"{said} The bound for so many bits and these spectra is {coding.bound:.4f}; at the scales of least error "
        f"these codes have {coding.least_error:.4f}, and a perfect code of that would save {coding.gap:.2f} bits a number."
    )


def _initialised(record: Fidelity) -> list[str]:
    """What A's random initialisation saved, in a sentence."""
    known = record.initialisation
    if known is None:
        return []
    found = f"A's random initialisation was found (seed {known.seed}): training changed {known.changed:.1%} of A"
    if known.file is not None:
        found = (
            f"Its codes are against {known.file}, which must lie in this directory, beside it or above: {known.changed:.1%} of A "
            "is its own"
        )
    if not known.used:
        return [f"{found}, too much for codes against it to be smaller."]
    without = known.bytes_without or 0
    return [
        f"{found}, and in {known.used} of {record.source.modules} modules codes hold nothing else of it. Without it this error "
        f"would take about {without:,} bytes, {without / record.compact.bytes:.2f} times as many."
    ]


def _against_svd(transform: str, error: float, svd: float) -> str:
    numbers = f"relative error {error:.4f} against {svd:.4f}"
    if transform == "none":
        return f"This is plain truncated SVD ({numbers} for the best rank per module before rounding)."
    if error < svd * (1 - TIE):
        return f"Sharing paid: plain SVD of the same size loses more ({numbers})."
    if error <= svd * (1 + TIE):
        return f"Sharing neither paid nor cost: plain SVD of the same size loses as much ({numbers})."
    return f"Sharing did not pay: plain SVD of the same size, a rank for each module, loses less ({numbers})."


def behaviour(functional: Verification) -> list[str]:
    """What `verify` found, for a reader."""
    said = []
    if functional.retention is not None:
        said.append(
            f"It keeps {functional.retention:.2%} of the adapter's effect on the base model's predictions, and predicts the same "
            f"next token as the reference {functional.agreement:.1%} of the time."
        )
    for name, task in functional.tasks.items():
        low, high = task.difference_ci95
        words = "no difference can be seen" if low <= 0 <= high else "lower" if high < 0 else "higher"
        if too_few(task.items):
            words = f"over {task.items} items, too few to tell"
        said.append(f"{name}: {task.compact:.1%} against {task.reference:.1%}, {words}.")
    said += [
        f"Missed: the {measure} is {value}; {bound} {limit} was asked for."
        for measure, bound, limit, value, passed in thresholds(functional)
        if not passed
    ]
    return said


def thresholds(functional: Verification) -> list[tuple[str, str, str, str, bool]]:
    """Each threshold in words: what was measured, at most or at least, the limit, the value, whether it was met."""
    found = []
    for name, checked in functional.thresholds.items():
        measure, shown = MEASURES[name], SHOWN.get(name, _share)
        found.append((measure.text, measure.bound, shown(checked.limit), shown(checked.value), checked.passed))
    return found


def attention(notes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The texts of the urgent notes, and of the others."""
    found = [Note.parse(note) for note in notes]
    return [one.text for one in found if one.is_urgent], [one.text for one in found if not one.is_urgent]


def intervals(functional: Verification) -> str | None:
    """Between what the measures on prompts lie with 95 % certainty; None where there are none."""
    kl, kept, same = functional.kl_ci95, functional.retention_ci95, functional.agreement_ci95
    if functional.prompts is None or kl is None or kept is None or same is None:
        return None
    few = " (too few rows)" if too_few(functional.prompts.rows) else ""
    return (
        f"95 % intervals over {functional.prompts.rows} rows{few}: KL {kl[0]:.5f} to {kl[1]:.5f}, effect kept {kept[0]:.2%} to "
        f"{kept[1]:.2%}, same next token {same[0]:.1%} to {same[1]:.1%}."
    )


def evidence(found: EvidenceRecord) -> list[str]:
    """In which metric the fit was made, and what the result does on the test rows."""
    rows, kl, metric, proof = found.rows, found.metric.kl, found.metric.kept, found.proof
    name = "the plain metric" if metric == "plain" else f"the {metric} metric of {rows['calibration']} prompts"
    others = ", ".join(f"{other} {value:.5f}" for other, value in kl.items() if other != metric)
    kept, same = proof.retention_ci95, proof.agreement_ci95
    return [
        f"Fitted in {name}: KL {kl[metric]:.5f} on {rows['validation']} validation rows"
        + (f" ({others})." if others else "."),
        f"On {rows['test']} test rows it keeps {proof.retention:.2%} of the adapter's effect on the predictions "
        f"({kept[0]:.2%} to {kept[1]:.2%} with 95 % certainty; KL {proof.kl:.5f}, bare base {proof.base_kl:.5f}) and predicts "
        f"the same next token {proof.agreement:.1%} of the time ({same[0]:.1%} to {same[1]:.1%}).",
    ]


def reached(record: Fidelity) -> list[str]:
    """How a behaviour that was asked for was sought, and what was kept does on the test rows."""
    aim = record.aim
    if not aim.path:
        return []
    name, limit = next(iter(aim.asked.items()))
    kept, proof, measure = next(step for step in aim.path if step.kept), aim.proofs[-1], MEASURES[name]
    failed = sum(not one.met for one in aim.proofs)
    again = f" (after {failed} that failed there)" if failed else ""
    return [
        f"{measure.flag} {limit:g} is reached in {kept.byte_ratio:.1%} of the bytes, the smallest of {len(aim.path)} sizes that "
        f"were tried: with 95 % certainty {measure.bound} {kept.bound:.5g} on the validation rows, and "
        f"{proof[measure.name]:.5g} on {proof.rows} test rows{again}."
    ]


def trained(training: TrainingRecord) -> list[str]:
    """What distillation did."""
    before, after = training.heldout_kl_before, training.heldout_kl_after
    if training.kept_step == 0:
        return [
            f"{training.steps} steps of distillation found nothing better than the start (held-out KL {before:.5f})."
        ]
    return [
        f"Distillation took the KL on held-out prompts from {before:.5f} to {after:.5f} "
        f"({after / before:.1%} of it) in {training.kept_step} steps ({training.trained} part trained)."
    ]
