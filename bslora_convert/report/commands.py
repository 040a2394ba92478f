"""Commands that a page or a verb tells its reader to run next, with what it knows filled in."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bslora_convert.comparison.forms import FORMS, OWN_SIZE, SUFFIX
from bslora_convert.comparison.winners import Row, error, kl, winners
from bslora_convert.files.address import MARK
from bslora_convert.files.store import as_written, is_url

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


def compress(record: Mapping[str, Any]) -> dict[float, Advice]:
    """For each size of a comparison the best form that `compress` makes, and the call that makes that one.

    Best is the lowest KL where behaviour was measured. Errors of weights don't tell an update that is too weak from one that is
    noisy, and least squares have the lowest: without behaviour, unbiased forms come first (`fit.gain`).
    """
    ranked: list[tuple[Mapping[str, tuple[str, ...]], Callable[[Row], float | None], str]] = [
        (UNSCALED, error, "lowest error"),
        (SCALED, error, "lowest error of unbiased forms, which behave better"),
        (CALLS, kl, "lowest KL"),
    ]
    found = {}
    for among, measure, reason in ranked:  # a later one overrules
        for budget, form in winners(record, among, measure).items():
            words = (*CALLS[form], f"{budget:g}")
            call = _joined("compress", record["source"]["path"], "OUT_DIR", *words)
            found[budget] = Advice(form, f"{reason} that compress makes", call)
    return found


def analyze(record: Mapping[str, Any]) -> str:
    """The analysis that a record is of, with what the layers put out."""
    return _joined(
        "analyze", record["source"]["path"], "--base-model", UNKNOWN_BASE, *PROMPTS, "--out", "OUT_DIR"
    )  # fmt: skip


def after_compress(record: Mapping[str, Any], place: str) -> str:
    """Behaviour that was proved is served; the rest is measured first."""
    if record["aim"]["proofs"] or record.get("evidence", {}).get("proof"):
        return expand(place)
    return verify(place)


def after_inspect(result: Mapping[str, Any], place: str) -> str | None:
    """A LoRA is converted; what is compact is measured, or repaired where it changed."""
    if result["kind"] == "lora":
        return _joined("compress", place, "OUT_DIR") if result["convertible"] else None
    if result["kind"] == "bslora":
        return verify(place) if result.get("integrity") != "changed" else None
    return _joined("compress", place, "OUT_DIR")


def after_analyze(record: Mapping[str, Any]) -> str:
    """The conversion at the default's error, which tries sharing where it may pay."""
    return _joined("compress", record["source"]["path"], "OUT_DIR")


def after_verify(record: Mapping[str, Any], place: str) -> str:
    """What passed is served; what missed is distilled or made anew, larger."""
    if record["passed"]:
        return expand(place)
    aim = ["--min-retention", "0.99", "--base-model", UNKNOWN_BASE, "--prompts", "ROWS.jsonl"]
    return _joined("compress", "LORA_DIR", place, *aim, "--overwrite")


def after_batch(summary: Mapping[str, Any], place: str) -> str:
    """What failed is tried again, else the library is measured."""
    if summary["run"]["bad"] or summary["run"]["gave_up"]:
        return _joined("batch", place, "--resume", "--retry-failed")
    return verify(place)


def after_expand(result: Mapping[str, Any], place: str) -> str | None:
    """How vLLM is started with it; nothing where another engine reads it, or no server's slot holds it."""
    served = result["served"]
    if served is None or served["max_lora_rank"] is None or result.get("engine") not in (None, "vllm"):
        return None
    rank = str(served["max_lora_rank"])
    said = shlex.join(
        ["vllm", "serve", result.get("base_model") or UNKNOWN_BASE, "--enable-lora", "--max-lora-rank", rank]
    )
    name = place.rstrip("/").rpartition("/")[2]
    return f"{said} --lora-modules {shlex.quote(f'{name}={place}')}" if "modules" in result else said


def after_capacity(place: str) -> str:
    """Adapters as a server loads them."""
    return expand(place)


def expand(place: str) -> str:
    """What a server loads, beside the place, or here where that is elsewhere."""
    place = as_written(place).rstrip("/") or "/"
    here = place.partition(MARK)[0].rpartition("/")[2].partition("@")[0] if is_url(place) else place.rstrip("/")
    return _joined("expand", place, f"{here}-served", "--for", "vllm")


def _joined(*words: str) -> str:
    return shlex.join(["bslora-convert", *words])
