"""What the verbs return: records by attribute, by key, and as they are written."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bslora_convert import analyze, batch, compare, compress, expand, expand_library, inspect, verify, verify_library
from bslora_convert.errors import InputError
from bslora_convert.library.manifest import read_manifest
from bslora_convert.results.adapter import Expanded, Fidelity, Inspection
from bslora_convert.results.analysis import Analysis, Comparison
from bslora_convert.results.behaviour import LibraryVerification, TaskRecord, Verification
from bslora_convert.results.library import BatchPlan, BatchSummary, Capacity, LibraryExpansion
from bslora_convert.results.record import Record
from bslora_convert.verbs.capacity import capacity
from tests.conftest import FIXTURES

TINY = FIXTURES / "tiny"


def agree(kind: type[Record], record: Any) -> None:
    """A verb's result is of its type, down to every record within it, and is read back from its JSON."""
    assert isinstance(record, kind)
    assert kind.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_verbs_return_records(tmp_path: Path) -> None:
    record = compress(TINY / "gsm8k", tmp_path / "out")
    assert record == json.loads((tmp_path / "out" / "fidelity.json").read_text())
    assert record["weight"]["relative_error"] == record.weight.relative_error
    assert "training" not in record and "training" not in record.to_dict()
    for kind, part in (
        (Fidelity, record),
        (Inspection, inspect(TINY / "gsm8k")),
        (Inspection, inspect(tmp_path / "out")),
        (Expanded, expand(tmp_path / "out", tmp_path / "lora")),
        (Analysis, analyze(TINY / "gsm8k", draws=2)),
        (Comparison, compare(TINY / "gsm8k", forms=["svd_adaptive"], budgets=[0.5])),
        (
            Verification,
            verify(tmp_path / "out", base_model=str(TINY / "base"), prompts=TINY / "gsm8k-heldout.jsonl", limit=2),
        ),
    ):
        agree(kind, part)


def test_a_record_of_another_shape_is_named() -> None:
    task = {"metric": "acc", "items": 1, "base": 0.0, "reference": 0.0, "compact": 0.0, "difference_ci95": [0.0, 0.0]}
    assert TaskRecord.from_dict(task) == task
    for wrong, words in (
        ({"metric": "acc"}, "TaskRecord: the key base is missing"),
        ({**task, "more": 1}, "TaskRecord: the key more is unknown"),
    ):
        with pytest.raises(InputError, match=words):
            TaskRecord.from_dict(wrong)


def test_so_have_those_of_a_library(tmp_path: Path) -> None:
    library = tmp_path / "library"
    shutil.copytree(TINY / "gsm8k", library / "gsm8k")
    out = tmp_path / "out"
    agree(BatchPlan, batch(library, out, workers=0, dry_run=True))
    agree(BatchSummary, batch(library, out, workers=0))
    agree(Capacity, capacity(read_manifest(out), 80, 20))
    agree(LibraryExpansion, expand_library(out, tmp_path / "loras"))
    prompts = TINY / "gsm8k-heldout.jsonl"
    agree(LibraryVerification, verify_library(out, base_model=TINY / "base", prompts=prompts, limit=2))
