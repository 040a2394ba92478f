"""Commands that a page tells its reader to run next, with what the page knows filled in."""

import shlex
from collections.abc import Mapping
from typing import Any

from bslora_convert.comparison.forms import FORMS, OWN_SIZE
from bslora_convert.comparison.winners import winners

UNKNOWN_BASE = "BASE_MODEL"
PROMPTS = ["--prompts", "HELD_OUT.jsonl"]


def verify(place: str, base_model: str | None = None) -> str:
    """Measures the behaviour of a compact directory and keeps it there; on the base model that it names where none is given."""
    return _joined("verify", place, *(["--base-model", base_model] if base_model else []), *PROMPTS, "--save")


def compare(record: Mapping[str, Any]) -> str:
    """The comparison that a record is of, with behaviour."""
    forms = list(dict.fromkeys(row["form"] for row in record["rows"]))
    budgets = dict.fromkeys(row["budget"] for row in record["rows"] if row["form"] not in OWN_SIZE)
    words = ["compare", record["source"]["path"], "--base-model", UNKNOWN_BASE, *PROMPTS]
    if budgets:
        words += ["--budgets", ",".join(f"{budget:g}" for budget in budgets)]
    if set(forms) != set(FORMS):
        words += ["--forms", ",".join(forms)]
    return _joined(*words, "--out", "OUT_DIR")


CALLS = {  # how `compress` makes a form of the comparison; the rest it does not make
    "svd_uniform": ("--transform", "none", "--local-ranks", "uniform", "--budget"),
    "svd_adaptive": ("--transform", "none", "--budget"),
    "svd_int8": ("--transform", "none", "--bits", "8", "--bytes"),
    "svd_int4": ("--transform", "none", "--bits", "4", "--bytes"),
    "svd_mixed": ("--transform", "none", "--bytes"),
    "bslora_ss": ("--transform", "ss", "--max-rank", "none", "--budget"),
    "bslora_gt": ("--transform", "gt", "--max-rank", "none", "--budget"),
    "bslora_ke": ("--transform", "ke", "--max-rank", "none", "--budget"),
}


def compress(record: Mapping[str, Any]) -> dict[float, tuple[str, str]]:
    """For each size of a comparison the form of the lowest error that `compress` makes, and the call that makes it."""
    found = {}
    made = {**record, "rows": [row for row in record["rows"] if row["form"] in CALLS]}
    for budget, form in winners(made).items():
        found[budget] = form, _joined("compress", record["source"]["path"], "OUT_DIR", *CALLS[form], f"{budget:g}")
    return found


def analyze(record: Mapping[str, Any]) -> str:
    """The analysis that a record is of, with what the layers put out."""
    return _joined(
        "analyze", record["source"]["path"], "--base-model", UNKNOWN_BASE, *PROMPTS, "--out", "OUT_DIR"
    )  # fmt: skip


def _joined(*words: str) -> str:
    return shlex.join(["bslora-convert", *words])
