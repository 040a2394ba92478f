"""Tenants whose codes are against what their library has in common: both plans, from a directory and from a store."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from bslora_convert import Recipe, batch, load_compact
from bslora_convert.bslora.common import commons_in
from bslora_convert.vllm import worker
from bslora_convert.vllm.settings import PLANS, Settings
from bslora_convert.vllm.tenants import Tenants
from tests.conftest import FIXTURES
from tests.planting import forget_draws, siblings

TINY = FIXTURES / "tiny"
BASE = str(TINY / "base")
EVERY = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    siblings(root / "in", TINY / "gsm8k", 6)
    batch(root / "in", root / "out", Recipe(transform="none", max_error=0.2), workers=0, report_html=False)
    assert commons_in(root / "out")
    return root / "out"


@pytest.fixture
def stored(library: Path) -> Iterator[str]:
    memory = fsspec.filesystem("memory")
    memory.put(str(library), "/common-library", recursive=True)
    yield "memory://common-library"
    memory.rm("/common-library", recursive=True)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("remote", [False, True])
def test_a_tenant_is_what_its_codes_say(library: Path, stored: str, tmp_path: Path, plan: str, remote: bool) -> None:
    form = load_compact(library / "t2").form
    forget_draws()
    opened = Tenants(Settings(stored if remote else library, tmp_path / "cache", plan=plan))
    found = opened.find("t2", BASE)
    assert found is not None
    forget_draws()
    plain = (found.path / "adapter_model.safetensors") if plan == PLANS[0] else None
    tensors = load_file(plain) if plain is not None else worker.decoded(found.path, EVERY)
    for name in form.modules:
        delta = form.delta(name)
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
        torch.testing.assert_close(b @ a, delta.b @ delta.a, rtol=1e-2, atol=1e-3)
