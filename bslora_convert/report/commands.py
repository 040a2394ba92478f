"""Commands that a page or a verb tells its reader to run next, with what it knows filled in."""

import shlex
from collections.abc import Sequence

from bslora_convert.files.address import MARK
from bslora_convert.files.store import as_written, is_url
from bslora_convert.layers.slots import TARGET_MODULES
from bslora_convert.results.adapter import Expanded, Fidelity, Inspection
from bslora_convert.results.analysis import Analysis
from bslora_convert.results.behaviour import Verification
from bslora_convert.results.library import BatchSummary, LibraryExpansion

UNKNOWN_BASE = "BASE_MODEL"
PROMPTS = ["--prompts", "HELD_OUT.jsonl"]


def verify(place: str, base_model: str | None = None) -> str:
    """Measures the behaviour of a compact directory and keeps it there; on the base model that it names where none is given."""
    return joined("verify", place, *(["--base-model", base_model] if base_model else []), *PROMPTS, "--save")


def analyze(record: Analysis) -> str:
    """The analysis that a record is of, with what the layers put out."""
    return joined(
        "analyze", record.source["path"], "--base-model", UNKNOWN_BASE, *PROMPTS, "--out", "OUT_DIR"
    )  # fmt: skip


def after_compress(record: Fidelity, place: str) -> str:
    """Behaviour that was proved is served; the rest is measured first."""
    if record.evidence is not None:
        return expand(place)
    return verify(place)


def after_inspect(result: Inspection, place: str) -> str | None:
    """A LoRA is converted; what is compact is measured, or repaired where it changed."""
    if result.kind == "lora":
        return joined("compress", place, "OUT_DIR") if result.convertible else None
    if result.kind == "bslora":
        return verify(place) if result.integrity != "changed" else None
    return joined("compress", place, "OUT_DIR")


def after_analyze(record: Analysis) -> str:
    """The conversion at the default's error, which tries sharing where it may pay."""
    return joined("compress", record.source["path"], "OUT_DIR")


def after_verify(record: Verification, place: str) -> str:
    """What passed is served; what missed is distilled or made anew, larger."""
    if record.passed:
        return expand(place)
    aim = ["--min-retention", "0.99", "--base-model", UNKNOWN_BASE, "--prompts", "ROWS.jsonl"]
    return joined("compress", "LORA_DIR", place, *aim, "--overwrite")


def after_batch(summary: BatchSummary, place: str) -> str:
    """What failed is tried again, else the library is measured."""
    if summary.is_failed:
        return joined("batch", place, "--resume", "--retry-failed")
    return verify(place)


def after_expand(result: Expanded | LibraryExpansion, place: str) -> str | None:
    """How vLLM is started with it; nothing where another engine reads it, or no server's slot holds it."""
    served = result.served
    if served is None or served.max_lora_rank is None:
        return None
    start = serving_options(served.max_lora_rank, served.target_modules, served.options)
    if not isinstance(result, Expanded):
        return shlex.join(["vllm", "serve", UNKNOWN_BASE, *start])
    if result.engine not in (None, "vllm"):
        return None
    name = place.rstrip("/").rpartition("/")[2]
    said = shlex.join(["vllm", "serve", result.base_model or UNKNOWN_BASE, *start])
    return f"{said} --lora-modules {shlex.quote(f'{name}={place}')}"


def serving_options(
    rank: int | str, target_modules: Sequence[str] | None, more: Sequence[str] | None = None
) -> list[str]:
    """How vLLM is started for adapters of so large a rank, with room for their kinds of modules alone."""
    told = [TARGET_MODULES, *target_modules] if target_modules else []
    return ["--enable-lora", "--max-lora-rank", f"{rank}", *(more or ()), *told]


def serve_library(summary: BatchSummary, place: str) -> str | None:
    """How vLLM is started with the plugin on a library; nothing where no server's slot holds it."""
    found = summary.serving
    if found is None or not found["compact"]["slot_rank"]:
        return None
    bases = list(summary.bases)
    base = bases[0] if len(bases) == 1 and bases[0] != "unnamed" else UNKNOWN_BASE
    options = serving_options(found["compact"]["slot_rank"], found.get("target_modules"))
    return f"BSLORA_LIBRARY={shlex.quote(place)} VLLM_ALLOW_RUNTIME_LORA_UPDATING=True " + shlex.join(
        ["vllm", "serve", base, *options]
    )


def after_capacity(place: str) -> str:
    """Adapters as a server loads them."""
    return expand(place)


def expand(place: str) -> str:
    """What a server loads, beside the place, or here where that is elsewhere."""
    place = as_written(place).rstrip("/") or "/"
    here = place.partition(MARK)[0].rpartition("/")[2].partition("@")[0] if is_url(place) else place.rstrip("/")
    return joined("expand", place, f"{here}-served", "--for", "vllm")


def joined(*words: str) -> str:
    """A call of this tool, quoted for a shell."""
    return shlex.join(["bslora-convert", *words])
