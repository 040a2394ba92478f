"""The tiny base model with the adapter that tests of distillation train against."""

import pytest

from bslora_convert.behaviour.workshop import Workshop, open_workshop
from tests.conftest import FIXTURES

TINY = FIXTURES / "tiny"
BASE, LORA, PROMPTS = TINY / "base", TINY / "banking77", TINY / "banking77-heldout.jsonl"


@pytest.fixture(scope="module")
def workshop() -> Workshop:
    return open_workshop(LORA, str(BASE))
