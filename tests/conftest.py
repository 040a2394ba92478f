from pathlib import Path

import pytest
import torch

FIXTURES = Path(__file__).parent.parent / "fixtures"
REAL_ADAPTER = FIXTURES / "smollm2-135m-math-r16"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_adapter() -> Path:
    return REAL_ADAPTER
