"""What the tests of the plugin have in common."""

import shutil
from pathlib import Path

import pytest

from bslora_convert.recipe.recipe import Recipe
from bslora_convert.verbs.batch import batch
from tests.conftest import FIXTURES

TINY = FIXTURES / "tiny"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of two real adapters in codes, which is copied before it is changed."""
    place = tmp_path_factory.mktemp("vllm")
    for name, source in (("team/math", "gsm8k"), ("bank", "banking77")):
        shutil.copytree(TINY / source, place / "in" / name)
    batch(place / "in", place / "library", Recipe(transform="none", bytes=0.25), workers=0)
    return place / "library"
