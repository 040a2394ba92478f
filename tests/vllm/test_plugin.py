"""The two files that vLLM calls, on stand-ins of its interfaces: what it does with them `test_served.py` sees in a real one."""

import asyncio
import json
import logging
import os
import re
import shlex
import shutil
import subprocess
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


class Answered(Exception):
    """FastAPI's HTTPException."""

    def __init__(self, status_code: int, detail: str) -> None:
        super().__init__(f"{status_code}: {detail}")


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
        "fastapi": {"HTTPException": Answered},
    }  # fmt: skip
    for name, content in parts.items():
        module = ModuleType(name)
        for key, value in content.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    for name in ("BSLORA_PLAN", "BSLORA_BASE_ALIASES", "BSLORA_CACHE_GIB", "BSLORA_STRICT"):
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
    request = ask(stand_in.registry, "t")
    assert request is not None
    assert (request.lora_name, Path(request.lora_path).parent.name) == ("t", plan)
    assert ask(stand_in.registry, "../t") is None
    shutil.rmtree(tmp_path / "library" / "t")
    (tmp_path / "library" / "t").mkdir()
    (tmp_path / "library" / "t" / "adapter_config.json").write_text("{")
    with pytest.raises(Answered, match=r"^400: 't' is refused: t/adapter_model\.safetensors: can't be read"):
        ask(stand_in.registry, "t")


def unwritable(library: Path, cache: Path) -> None:
    cache.write_text("a file")


def of_another_version(library: Path, cache: Path) -> None:
    path = library / "t" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 4}))


def torn(library: Path, cache: Path) -> None:
    (library / "manifest.jsonl").write_text("{\n{}\n")


FAULTS = {
    "BSLORA_CACHE .* can't be written to": unwritable,
    "holds no adapter that can be served: t: format_version is 4": of_another_version,
    "line 1 is damaged": torn,
    "BSLORA_LIBRARY is": lambda library, cache: shutil.rmtree(library),
}


@pytest.mark.parametrize("words", FAULTS)
def test_a_server_that_can_not_serve_its_tenants_does_not_start(
    stand_in: SimpleNamespace, library: Path, tmp_path: Path, words: str, caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    FAULTS[words](library, tmp_path / "cache")
    with pytest.raises(SystemExit):
        plugin.register()
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.search(words, line)
    assert "BSLORA_STRICT=0" in line
    assert not stand_in.registry.held
    monkeypatch.setenv("BSLORA_STRICT", "0")
    plugin.register()
    with pytest.raises(Answered, match=r"^400: "):  # a tenant is never unknown for a fault of the server's own
        ask(stand_in.registry, "t")


def test_some_adapters_of_another_version_are_named(
    stand_in: SimpleNamespace, library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(library / "t", library / "old")
    of_another_version(library, tmp_path)
    plugin.register()
    assert "1 adapters can't be served: t: format_version is 4" in caplog.text
    assert ask(stand_in.registry, "old") is not None


def test_a_worker_opens_nothing(stand_in: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin.multiprocessing, "parent_process", lambda: object())
    plugin.register()
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(not Path("/dev/shm").is_dir() or os.getuid() != 0, reason="mounts something")
def test_a_read_only_root_with_a_memory_backed_cache(library: Path, tmp_path: Path) -> None:
    """As a container has it: nothing can be written to but the cache."""
    code = (
        "import sys, logging; from pathlib import Path; from bslora_convert.vllm.starting import check, warm_up; "
        "from bslora_convert.vllm.settings import Settings; from bslora_convert.vllm.tenants import Tenants; "
        "settings = Settings.of(); check(settings); warm_up(); "
        f"print(Tenants(settings).find('t', {BASE!r}).path)"
    )
    inside = (
        "mount -t tmpfs tmpfs /dev/shm && mount -o remount,bind,ro / && cd / && ! touch /tmp/x 2>/dev/null && "
        f"exec {sys.executable} -B -c {shlex.quote(code)}"
    )
    given = {
        **os.environ,
        "BSLORA_LIBRARY": str(library),
        "BSLORA_CACHE": "/dev/shm/bslora",
        "TMPDIR": "/dev/shm",
        "PYTHONPATH": str(FIXTURES.parent),
    }
    done = subprocess.run(["unshare", "-m", "sh", "-c", inside], env=given, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr or "remount" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/dev/shm/bslora/lora/")


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
