"""Of a comparison, for each size: the best form that `compress` makes, why it and no other, and the call that makes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bslora_convert.comparison.forms import OWN_SIZE, SUFFIX, USUAL
from bslora_convert.comparison.winners import error, kl, winners
from bslora_convert.report.commands import PROMPTS, UNKNOWN_BASE, joined
from bslora_convert.results.analysis import Comparison, FormRow


def compare(record: Comparison) -> str:
    """The comparison that a record is of, with behaviour."""
    forms = list(dict.fromkeys(row.form for row in record.rows))
    budgets = dict.fromkeys(row.budget for row in record.rows if row.form not in OWN_SIZE)
    words = ["compare", record.source["path"], "--base-model", UNKNOWN_BASE, *PROMPTS]
    if budgets:
        words += ["--budgets", ",".join(f"{budget:g}" for budget in budgets)]
    if set(forms) != set(USUAL):
        words += ["--forms", ",".join(forms)]
    return joined(*words, "--out", "OUT_DIR")


MADE = {  # how `compress` makes a form of the comparison; the rest it does not make
    "svd_adaptive": ("--transform", "none", "--budget"),
    "svd_int8": ("--transform", "none", "--bits", "8", "--bytes"),
    "svd_int4": ("--transform", "none", "--bits", "4", "--bytes"),
    "svd_mixed": ("--transform", "none", "--bytes"),
    "bslora_ss": ("--transform", "ss", "--max-rank", "none", "--budget"),
    "bslora_gt": ("--transform", "gt", "--max-rank", "none", "--budget"),
    "bslora_ke": ("--transform", "ke", "--max-rank", "none", "--budget"),
}
UNSCALED = {form: ("--gain", "least-squares", *words) for form, words in MADE.items()}
SCALED = {f"{form}{SUFFIX}": words for form, words in MADE.items()}
CALLS = {**UNSCALED, **SCALED}


@dataclass(frozen=True, slots=True)
class Advice:
    """A form of a comparison, why it and no other, and the call that makes it."""

    form: str
    reason: str
    call: str


def compress(record: Comparison) -> dict[float, Advice]:
    """For each size of a comparison the best form that `compress` makes, and the call that makes that one.

    Best is the lowest KL where behaviour was measured. Errors of weights don't tell an update that is too weak from one that is
    noisy, and least squares have the lowest: without behaviour, unbiased forms come first (`fit.gain`).
    """
    ranked: list[tuple[Mapping[str, tuple[str, ...]], Callable[[FormRow], float | None], str]] = [
        (UNSCALED, error, "lowest error"),
        (SCALED, error, "lowest error of unbiased forms, which behave better"),
        (CALLS, kl, "lowest KL"),
    ]
    found = {}
    for among, measure, reason in ranked:  # a later one overrules
        for budget, form in winners(record, among, measure).items():
            words = (*CALLS[form], f"{budget:g}")
            call = joined("compress", record.source["path"], "OUT_DIR", *words)
            found[budget] = Advice(form, f"{reason} that compress makes", call)
    return found
