"""The types of what the verbs return hold every key of it and no other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bslora_convert import compare, compress, expand, inspect, verify
from bslora_convert import results as types
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
        (types.Comparison, compare(TINY / "gsm8k", forms=["svd_adaptive"], budgets=[0.5])),
    ):
        agree(kind, part)
    prompts = TINY / "gsm8k-heldout.jsonl"
    agree(types.Verification, verify(tmp_path / "out", base_model=str(TINY / "base"), prompts=prompts, limit=2))
