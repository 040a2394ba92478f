"""The tiny base model with the adapter that tests of distillation train against."""

import pytest

from bslora_convert.behaviour.adapter import read_adapter
from bslora_convert.behaviour.session import BaseModelSession
from tests.conftest import FIXTURES

TINY = FIXTURES / "tiny"
BASE, LORA, PROMPTS = TINY / "base", TINY / "banking77", TINY / "banking77-heldout.jsonl"


@pytest.fixture(scope="module")
def session() -> BaseModelSession:
    return BaseModelSession(read_adapter(LORA), str(BASE))
