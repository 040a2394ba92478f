"""The types of what the verbs return hold every key of it and no other."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bslora_convert import analyze, batch, compare, compress, expand, expand_library, inspect, verify, verify_library
from bslora_convert import results as types
from bslora_convert.library.manifest import read_manifest
from bslora_convert.verbs.capacity import capacity
from tests.conftest import FIXTURES

TINY = FIXTURES / "tiny"


def agree(kind: Any, record: Mapping[str, Any]) -> None:
    assert kind.__required_keys__ <= set(record) <= kind.__required_keys__ | kind.__optional_keys__, kind.__name__


def test_they_have_the_keys_that_the_records_have(tmp_path: Path) -> None:
    record = compress(TINY / "gsm8k", tmp_path / "out")
    agree(types.Fidelity, record)
    for kind, part in (
        (types.SourceRecord, record["source"]),
        (types.CompactRecord, record["compact"]),
        (types.WeightRecord, record["weight"]),
        (types.AimRecord, record["aim"]),
        (types.Inspection, inspect(TINY / "gsm8k")),
        (types.Inspection, inspect(tmp_path / "out")),
        (types.Expanded, expand(tmp_path / "out", tmp_path / "lora")),
        (types.Analysis, analyze(TINY / "gsm8k", draws=2)),
        (types.Comparison, compare(TINY / "gsm8k", forms=["svd_adaptive"], budgets=[0.5])),
    ):
        agree(kind, part)
    prompts = TINY / "gsm8k-heldout.jsonl"
    agree(types.Verification, verify(tmp_path / "out", base_model=str(TINY / "base"), prompts=prompts, limit=2))


def test_so_have_those_of_a_library(tmp_path: Path) -> None:
    library = tmp_path / "library"
    shutil.copytree(TINY / "gsm8k", library / "gsm8k")
    out = tmp_path / "out"
    agree(types.BatchPlan, batch(library, out, workers=0, dry_run=True))
    agree(types.Batch, batch(library, out, workers=0))
    agree(types.Capacity, capacity(read_manifest(out), 80, 20))
    agree(types.LibraryExpansion, expand_library(out, tmp_path / "loras"))
    prompts = TINY / "gsm8k-heldout.jsonl"
    agree(types.LibraryVerification, verify_library(out, base_model=TINY / "base", prompts=prompts, limit=2))
