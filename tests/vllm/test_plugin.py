"""The two files that vLLM calls, on stand-ins of its interfaces: what it does with them `test_served.py` sees in a real one."""

import asyncio
import json
import logging
import shutil
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from bslora_convert import Recipe, compress, load_compact
from bslora_convert.vllm import plugin, worker
from bslora_convert.vllm.settings import Settings
from bslora_convert.vllm.tenants import Tenants
from tests.conftest import FIXTURES

TINY = FIXTURES / "tiny"
BASE = str(TINY / "base")
EVERY = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@dataclass
class Request:
    lora_name: str
    lora_int_id: int
    lora_path: str


class Resolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> Request | None: ...


class Registry:
    def __init__(self) -> None:
        self.held: dict[str, Any] = {}

    def register_resolver(self, name: str, resolver: Resolver) -> None:
        self.held[name] = resolver


def helper_and_model() -> tuple[Any, Any]:
    """Classes with the class methods of vLLM 0.32, which say what they were given."""

    class PEFTHelper:
        @classmethod
        def from_dict(cls, config_dict: dict[str, Any]) -> Any:
            return SimpleNamespace(**config_dict)

        @classmethod
        def from_local_dir(cls, lora_path: str, max_position_embeddings: int | None) -> Any:
            return ("vLLM's own", lora_path)

    class LoRAModel:
        @classmethod
        def from_lora_tensors(
            cls, lora_model_id: int, tensors: Any, peft_helper: Any, device: str = "cuda", dtype: Any = None,
            model_vocab_size: Any = None, weights_mapper: Any = None, skip_prefixes: Any = None,
        ) -> Any:  # fmt: skip
            return SimpleNamespace(id=lora_model_id, tensors=tensors, helper=peft_helper, device=device, dtype=dtype)

        @classmethod
        def from_local_checkpoint(
            cls, lora_dir: str, expected_lora_modules: set[str], peft_helper: Any, *, lora_model_id: Any = None,
            device: str = "cuda", dtype: Any = None, model_vocab_size: Any = None, weights_mapper: Any = None,
            skip_prefixes: Any = None, moe_ep_spec: Any = None,
        ) -> Any:  # fmt: skip
            return ("vLLM's own", lora_dir)

    return PEFTHelper, LoRAModel


@pytest.fixture
def library(tmp_path: Path) -> Path:
    compress(
        TINY / "gsm8k",
        tmp_path / "library" / "t",
        Recipe(transform="ke", budget=0.5, shared_size=32),
        report_html=False,
    )
    return tmp_path / "library"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, library: Path, tmp_path: Path) -> SimpleNamespace:
    """vLLM's modules, as far as the plugin imports them."""
    found = SimpleNamespace(registry=Registry())
    found.helper, found.model = helper_and_model()
    parts: dict[str, dict[str, Any]] = {
        "vllm": {}, "vllm.lora": {}, "vllm.lora.request": {"LoRARequest": Request},
        "vllm.lora.resolver": {"LoRAResolver": Resolver, "LoRAResolverRegistry": found.registry},
        "vllm.lora.peft_helper": {"PEFTHelper": found.helper}, "vllm.lora.lora_model": {"LoRAModel": found.model},
    }  # fmt: skip
    for name, content in parts.items():
        module = ModuleType(name)
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("BSLORA_PLAN", "BSLORA_BASE_ALIASES", "BSLORA_CACHE_GIB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BSLORA_LIBRARY", str(library))
    monkeypatch.setenv("BSLORA_CACHE", str(tmp_path / "cache"))
    return found


def ask(registry: Registry, name: str) -> Request | None:
    found: Request | None = asyncio.run(registry.held[plugin.NAME].resolve_lora(BASE, name))
    return found


@pytest.mark.parametrize("plan", ["lora", "compact"])
def test_names_become_requests(
    stand_in: SimpleNamespace, tmp_path: Path, plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BSLORA_PLAN", plan)
    plugin.register()
    assert not (tmp_path / "cache").exists()  # a worker opens nothing
    request = ask(stand_in.registry, "t")
    assert request is not None
    assert (request.lora_name, Path(request.lora_path).parent.name) == ("t", plan)
    assert ask(stand_in.registry, "../t") is None
    shutil.rmtree(tmp_path / "library" / "t")
    (tmp_path / "library" / "t").mkdir()
    (tmp_path / "library" / "t" / "adapter_config.json").write_text("{")
    refused = ask(stand_in.registry, "t")
    assert refused is not None
    assert Path(refused.lora_path).name == "refused"


def test_a_cache_that_can_not_be_opened_raises_nothing(
    stand_in: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    plugin.register()
    assert ask(stand_in.registry, "t") is None
    assert "can't be resolved" in caplog.text


def test_another_vllm_gets_loras_that_are_written(
    stand_in: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("BSLORA_PLAN", "compact")
    monkeypatch.setattr(stand_in.helper, "from_local_dir", classmethod(lambda cls, path: None))
    plugin.register()
    assert "PEFTHelper.from_local_dir has no lora_path" in caplog.text
    request = ask(stand_in.registry, "t")
    assert request is not None
    assert Path(request.lora_path).parent.name == "lora"


def test_workers_decode_what_is_compact_and_nothing_else(library: Path, tmp_path: Path) -> None:
    helper, model = helper_and_model()
    assert worker.unfit(helper, model) is None
    worker.install(helper, model)
    worker.install(helper, model)
    assert worker.unfit(helper, model) is None
    plain = tmp_path / "plain"
    plain.mkdir()
    assert helper.from_local_dir(str(plain), 512) == ("vLLM's own", str(plain))
    assert model.from_local_checkpoint(str(plain), EVERY, None) == ("vLLM's own", str(plain))
    tenant = Tenants(Settings(library, tmp_path / "cache", plan="compact")).find("t", BASE)
    assert tenant is not None
    said = helper.from_local_dir(str(tenant.path), 512)
    form = load_compact(library / "t").form
    largest = max(form.expanded_rank(name) for name in form.modules)
    assert (said.r, said.lora_alpha, said.vllm_max_position_embeddings) == (largest, largest, 512)
    assert set(said.target_modules) == EVERY
    loaded = model.from_local_checkpoint(
        str(tenant.path), EVERY, peft_helper=said, lora_model_id=7, device="cpu", dtype=torch.float32, moe_ep_spec=None
    )
    assert (loaded.id, loaded.device, loaded.dtype) == (7, "cpu", torch.float32)
    for name in form.modules:
        delta = form.delta(name)
        a, b = (loaded.tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(a, delta.a.to(a.dtype))
        assert torch.equal(b, delta.b.to(b.dtype))
    with pytest.raises(ValueError, match="none of the modules that are served"):
        model.from_local_checkpoint(str(tenant.path), {"q_proj"}, peft_helper=said)


def test_both_plans_give_the_same_tensors(library: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    written = Tenants(Settings(library, tmp_path / "a")).find("t", BASE)
    copied = Tenants(Settings(library, tmp_path / "b", plan="compact")).find("t", BASE)
    assert written and copied
    first, second = load_file(written.path / "adapter_model.safetensors"), worker.decoded(copied.path, EVERY)
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert json.loads((copied.path / "lora.json").read_text())["target_modules"] == sorted(EVERY)


def test_what_this_vllm_lacks_is_named() -> None:
    helper, model = helper_and_model()
    del model.from_lora_tensors
    assert worker.unfit(helper, model) == "LoRAModel.from_lora_tensors is missing"


def test_a_logger_below_vllms_writes_the_lines() -> None:
    assert logging.getLogger(plugin.LOGGER).parent in (logging.getLogger("vllm"), logging.getLogger())
    assert plugin.LOGGER.startswith("vllm.")
