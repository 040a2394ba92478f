"""A library in a store elsewhere: real stores of fsspec, a web server and the stand-in of the Hub, without vLLM."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from bslora_convert.errors import RecipeError
from bslora_convert.vllm import library as rooms
from bslora_convert.vllm.library import Away, Elsewhere
from bslora_convert.vllm.resolver import Declined, Resolver
from bslora_convert.vllm.settings import Settings
from bslora_convert.vllm.tenants import Tenants
from tests.conftest import FIXTURES
from tests.hub import hub
from tests.vllm.test_tenants import BASE, HOSTILE

TINY = FIXTURES / "tiny"


def holding(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@contextmanager
def in_memory(directory: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    for name, data in holding(directory).items():
        store.pipe(f"/library/{name}", data)
    yield "memory://library"
    store.rm("/library", recursive=True)


@contextmanager
def on_the_hub(directory: Path) -> Iterator[str]:
    with hub() as (held, address), pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", address)
        held.repos["org/all"] = {f"v1/{name}": data for name, data in holding(directory).items()}
        yield "hf://org/all/v1"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None: ...


@contextmanager
def on_the_web(directory: Path) -> Iterator[str]:
    pytest.importorskip("aiohttp")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(directory)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def asking(url: str, cache: Path) -> Resolver:
    return Resolver(Tenants(Settings(url, cache)), logging.getLogger("test"))


@pytest.mark.parametrize("store", [in_memory, on_the_hub, on_the_web])
def test_a_tenant_of_a_store_is_the_one_of_a_directory(made: Path, tmp_path: Path, store: Any) -> None:
    here = Tenants(Settings(made, tmp_path / "here"))
    with store(made) as url:
        there = asking(url, tmp_path / "there")
        for name in ("team/math", "bank"):
            expected, found = here.find(name, BASE), there.answer(name, BASE)
            assert expected is not None
            assert found is not None
            assert found.name == expected.path.name  # the digest of the same content
            assert holding(found) == holding(expected.path)
            assert there.answer(name, BASE) == found
        for name in ("nobody", "team", "team/math/adapter_config.json", "manifest.jsonl", ".batch"):
            assert there.answer(name, BASE) is None
    assert dict(there.outcomes.counts) == {"hit": 2, "loaded": 2, "refused": 0, "unknown": 5}


def test_hostile_names_never_reach_the_store(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    info = MemoryFileSystem.info
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: (asked.append(path), info(self, path))[1])
    with in_memory(made) as url:
        there = asking(url, tmp_path / "cache")
        for name in HOSTILE:
            assert there.answer(name, BASE) is None
        assert set(asked) == {"/library/manifest.jsonl"}  # for the one well-formed name


def test_damage_and_another_base_are_refused(made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = fsspec.filesystem("memory")
    with in_memory(made) as url:
        there = asking(url, tmp_path / "cache")
        good = store.cat("/library/bank/adapter_model.safetensors")
        config = json.loads(store.cat("/library/bank/adapter_config.json"))
        other = json.dumps(config | {"base_model_name_or_path": "org/other"}).encode()
        for file, data, words in (
            ("adapter_model.safetensors", good[:-9], "bank"),
            ("adapter_config.json", b"{", "not valid JSON"),
            ("adapter_config.json", other, "it is for the base model org/other"),
        ):
            before = store.cat(f"/library/bank/{file}")
            store.pipe(f"/library/bank/{file}", data)
            caplog.clear()
            with pytest.raises(Declined):
                there.answer("bank", BASE)
            assert words in caplog.text
            store.pipe(f"/library/bank/{file}", before)
        found = there.answer("bank", BASE)
    assert found is not None
    assert found.parent.name == "lora"


def test_what_is_larger_than_any_adapter_is_not_fetched(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(rooms.LARGEST, "adapter_model.safetensors", 100)
    monkeypatch.setattr(rooms, "read_manifest", lambda _: [{"id": "bank", "status": "ok"}])
    monkeypatch.setattr(MemoryFileSystem, "get_file", lambda *_, **__: pytest.fail("fetched"))
    with in_memory(made) as url:
        there = asking(url, tmp_path / "cache")
        with pytest.raises(Declined):
            there.answer("bank", BASE)
    assert "more than 100; no compact adapter" in caplog.text


def test_a_store_that_is_away_is_a_refusal_and_what_was_handed_out_stays(
    made: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with on_the_web(made) as url:
        there = asking(url, tmp_path / "cache")
        found = there.answer("bank", BASE)
    with pytest.raises(Declined):
        there.answer("team/math", BASE)
    assert "'team/math' is refused" in caplog.text
    assert "can't be fetched" in caplog.text
    assert found is not None
    assert (found / "adapter_model.safetensors").is_file()


def test_a_store_that_hangs_is_waited_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "info", lambda *_, **__: ends.wait(30))
    began = time.monotonic()
    there = Elsewhere("memory://library", patience=0.05)
    with pytest.raises(Away, match=r"memory://library: nothing came within 0\.05 s"), there.tenant("bank"):
        pass
    assert time.monotonic() - began < 25  # it did not wait for the end of the other
    ends.set()


def test_a_new_content_has_a_new_path_and_the_old_one_stays(made: Path, tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    with in_memory(made) as url:
        there = asking(url, tmp_path / "cache")
        first = there.answer("bank", BASE)
        for file in ("adapter_config.json", "adapter_model.safetensors", "fidelity.json"):
            store.pipe(f"/library/bank/{file}", (made / "team/math" / file).read_bytes())
        second = there.answer("bank", BASE)
        store.rm("/library/bank", recursive=True)
        assert there.answer("bank", BASE) is None
    assert first is not None
    assert second is not None
    assert first != second
    assert holding(second) == holding(there.tenants.snapshots.held / second.name)
    assert (first / "adapter_model.safetensors").is_file()


def test_settings_take_a_url_and_refuse_what_is_none(tmp_path: Path) -> None:
    given = {"BSLORA_LIBRARY": "s3://bucket/library", "BSLORA_CACHE": str(tmp_path / "c")}
    assert Settings.of(given) == Settings("s3://bucket/library", tmp_path / "c")
    for url, words in (
        ("s3://key:secret@bucket/library", "credentials belong in the environment"),
        ("https://host/library?token=secret", "credentials belong in the environment"),
        ("s3://bucket/../library", "without"),
        ("file:///library", "given by its path"),
        ("s3:", "or the URL of one"),
    ):
        with pytest.raises(RecipeError, match=words) as caught:
            Settings.of({**given, "BSLORA_LIBRARY": url})
        assert "secret" not in str(caught.value)
