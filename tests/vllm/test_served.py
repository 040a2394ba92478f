"""The plugin in a real vLLM: the same answers as PEFT, and nothing that a tenant does ends the server.

    make serve-test        # builds an environment with vLLM for CPUs, some gigabytes, and runs these

`BSLORA_VLLM_PYTHON` names the Python of an environment that has vLLM and this project. One server a plan is started for all tests
of the file, with room for a single adapter in each of its caches, so that every second request reads a path again.
"""

import json
import os
import random
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bslora_convert import Recipe, batch, expand
from bslora_convert.vllm.settings import PLANS
from tests.conftest import FIXTURES
from tests.planting import random_products, write_lora
from tests.vllm.serving import Answer, Server, serving
from tests.vllm.test_elsewhere import on_the_web
from tests.vllm.test_tenants import DAMAGE, HOSTILE, edited

PYTHON = os.environ.get("BSLORA_VLLM_PYTHON")
pytestmark = [
    pytest.mark.served,
    pytest.mark.skipif(not PYTHON, reason="BSLORA_VLLM_PYTHON names no environment with vLLM: make serve-test"),
]
TINY = FIXTURES / "tiny"
BASE = TINY / "base"
PROMPTS = ([5, 17, 260, 33, 8], list(range(20, 60)), [900, 4, 4, 77], list(range(300, 270, -1)))
CLOSE = 1e-4  # nats
ONE = ("--max-loras", "1", "--max-cpu-loras", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("served")
    for name, source in (("team/math", "gsm8k"), ("bank", "banking77"), ("leaves", "gsm8k"), ("comes", "banking77")):
        shutil.copytree(TINY / source, place / "in" / name)
    batch(place / "in", place / "library", Recipe(transform="none", bytes=0.25, dtype="float32"), workers=0)
    for kind in DAMAGE:
        shutil.copytree(place / "library" / "bank", place / "library" / slug(kind))
        DAMAGE[kind][0](place / "library" / slug(kind))
    shutil.copytree(place / "library" / "bank", place / "library" / "other-name")
    edited(base_model_name_or_path="org/other-model")(place / "library" / "other-name")
    write_lora(place / "sized" / "other-size", random_products(rank=4), base_model_name_or_path=str(BASE))
    batch(place / "sized", place / "made", Recipe(transform="none", budget=0.5), workers=0)
    shutil.copytree(place / "made" / "other-size", place / "library" / "other-size")
    shutil.copytree(place / "library" / "bank", place / "library" / "has-left")
    with (place / "library" / "manifest.jsonl").open("a") as manifest:
        for name in (*map(slug, DAMAGE), "other-name", "other-size"):
            manifest.write(json.dumps({"id": name, "status": "ok"}) + "\n")
    return place / "library"


@pytest.fixture(scope="module", params=PLANS)
def plan(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def library(made: Path, plan: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each server has a library of its own, in which the tests take away and replace."""
    return Path(shutil.copytree(made, tmp_path_factory.mktemp(plan) / "library"))


@pytest.fixture(scope="module")
def server(library: Path, plan: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    assert PYTHON
    place = tmp_path_factory.mktemp("server")
    with serving(PYTHON, BASE, place, environment(library, place) | {"BSLORA_PLAN": plan}, *ONE) as running:
        yield running
    assert "needs another vLLM" not in running.log.read_text(errors="replace")


def environment(library: Path | str, place: Path) -> dict[str, str]:
    return {"BSLORA_LIBRARY": str(library), "BSLORA_CACHE": str(place / "cache")}


def slug(kind: str) -> str:
    return f"bad-{kind.replace(' ', '-')}"


@torch.no_grad()
def beside_peft(library: Path, name: str | None, place: Path, answers: list[Answer]) -> float:
    """The largest difference of a log-probability between answers and PEFT's; the tokens have to be the same."""
    model: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    if name is not None:
        expand(library / name, place, dtype="float32")
        model = PeftModel.from_pretrained(model, str(place))
    worst = 0.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([[*prompt, *answer.tokens]])
        logs = model(input_ids=ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        assert logs.argmax(-1).tolist() == list(answer.tokens)
        worst = max(
            worst, *(abs(float(row[t]) - p) for row, t, p in zip(logs, answer.tokens, answer.logprobs, strict=True))
        )
    return worst


@pytest.mark.parametrize("name", [None, "team/math", "bank"])
def test_the_answers_are_those_of_peft(server: Server, library: Path, tmp_path: Path, name: str | None) -> None:
    answers = [server.ask(name or str(BASE), prompt) for prompt in PROMPTS]
    assert [answer.status for answer in answers] == [200] * len(PROMPTS)
    assert beside_peft(library, name, tmp_path / "lora", answers) < CLOSE


def test_what_expand_writes_for_vllm_is_served_without_the_plugin(
    server: Server, library: Path, tmp_path: Path
) -> None:
    """Modules of several ranks, with a pattern a rank."""
    expand(library / "team/math", tmp_path / "plain", engine="vllm")
    assert json.loads((tmp_path / "plain" / "adapter_config.json").read_text())["rank_pattern"]
    asked = {"lora_name": "plain", "lora_path": str(tmp_path / "plain")}
    assert server.post("/v1/load_lora_adapter", asked)[0] == 200
    answers = [server.ask("plain", prompt) for prompt in PROMPTS]
    assert beside_peft(library, "team/math", tmp_path / "lora", answers) < CLOSE
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "plain"})[0] == 200


@pytest.mark.parametrize("name", [name for name in HOSTILE if name])  # vLLM takes an empty name for the base
def test_names_that_no_library_gives_out_are_404(server: Server, name: str) -> None:
    assert server.ask(name, [5], 1).status == 404


def test_what_is_no_tenant_is_404(server: Server, library: Path) -> None:
    assert server.ask(str(library / "bank"), [5], 1).status == 404
    assert (library / "has-left" / "adapter_config.json").is_file()  # its files are there, and the manifest has it not
    assert server.ask("has-left", [5], 1).status == 404


@pytest.mark.parametrize("kind", [*map(slug, DAMAGE), "other-name", "other-size"])
def test_what_can_not_be_served_is_400_with_one_reason(server: Server, library: Path, kind: str) -> None:
    before = len(server.log.read_text(errors="replace"))
    status, text = server.post("/v1/completions", {"model": kind, "prompt": [5], "max_tokens": 1})
    reason = json.loads(text)["error"]["message"]
    assert (status, reason.partition(": ")[0]) == (400, f"'{kind}' is refused")
    assert str(library) not in reason
    said = [line for line in server.log.read_text(errors="replace")[before:].splitlines() if kind in line]
    assert len(said) == 1, said
    assert f"'{kind}' is refused: " in said[0]
    status, text = server.post("/v1/chat/completions", {"model": kind, "messages": [{"role": "user", "content": "x"}]})
    assert (status, json.loads(text)["error"]["message"]) == (400, reason)
    assert server.ask("bank", [5], 1).status == 200


def test_a_tenant_that_is_taken_away_ends_nothing(server: Server, library: Path) -> None:
    """vLLM reads the path again once the adapter has left its caches, which hold one here."""
    first = server.ask("leaves", PROMPTS[0])
    shutil.rmtree(library / "leaves")
    assert server.ask("bank", [5], 1).status == 200  # now it has left
    assert server.ask("leaves", PROMPTS[0]).tokens == first.tokens
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "leaves"})[0] == 200
    assert server.ask("leaves", [5], 1).status == 404
    assert server.get("/health")[0] == 200


def test_a_tenant_that_is_replaced_gets_its_new_weights(server: Server, library: Path, tmp_path: Path) -> None:
    before = [server.ask("comes", prompt) for prompt in PROMPTS]
    shutil.rmtree(library / "comes")
    shutil.copytree(library / "team/math", library / "comes")
    assert server.ask("bank", [5], 1).status == 200
    assert [server.ask("comes", prompt).tokens for prompt in PROMPTS] == [
        answer.tokens for answer in before
    ]  # as it was
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "comes"})[0] == 200
    after = [server.ask("comes", prompt) for prompt in PROMPTS]
    assert [answer.tokens for answer in after] != [answer.tokens for answer in before]
    assert beside_peft(library, "team/math", tmp_path / "lora", after) < CLOSE


@pytest.mark.parametrize("fault", ["cache", "library"])
def test_a_server_without_its_cache_or_library_does_not_start(library: Path, tmp_path: Path, fault: str) -> None:
    assert PYTHON
    (tmp_path / "file").write_text("not a directory")
    given = environment(library, tmp_path) | {f"BSLORA_{fault.upper()}": str(tmp_path / "file")}
    with pytest.raises(RuntimeError, match=f"BSLORA_{fault.upper()}"), serving(PYTHON, BASE, tmp_path, given, *ONE):
        pass
    log = (tmp_path / "server.log").read_text(errors="replace")
    assert "the server does not start" in log
    assert "Traceback" not in log


def test_the_counters_stand_among_vllms_metrics(server: Server) -> None:
    said = server.get("/metrics")[1]
    counts = {
        line.split('outcome="')[1].split('"')[0]: float(line.split()[-1])
        for line in said.splitlines()
        if line.startswith("bslora_convert_tenants_total{")
    }
    assert set(counts) >= {"loaded", "refused", "unknown"}
    assert all(counts.values())


def test_a_library_of_a_url_and_its_store_going_away(made: Path, tmp_path: Path) -> None:
    assert PYTHON
    (tmp_path / "server").mkdir()
    with ExitStack() as store, ExitStack() as running:
        given = environment(store.enter_context(on_the_web(made)), tmp_path / "server")
        there = running.enter_context(serving(PYTHON, BASE, tmp_path / "server", given, *ONE))
        answers = [there.ask("bank", prompt) for prompt in PROMPTS]
        assert beside_peft(made, "bank", tmp_path / "lora", answers) < CLOSE
        assert [there.ask(name, [5], 1).status for name in ("nobody", "../bank", "other-name")] == [404, 404, 400]
        assert there.ask("leaves", [5], 1).status == 200  # bank has left the caches
        store.close()
        assert there.ask("comes", [5], 1).status == 400
        assert "'comes' is refused: " in there.log.read_text(errors="replace")
        assert [there.ask("bank", prompt).tokens for prompt in PROMPTS] == [answer.tokens for answer in answers]
        assert there.get("/health")[0] == 200


def test_many_clients_and_more_tenants_than_slots(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tenants in Zipf order, clients at once: each answer is its tenant's. With BSLORA_SOAK_SECONDS 100 tenants, 8 clients."""
    assert PYTHON
    place = tmp_path_factory.mktemp("soak")
    long = os.environ.get("BSLORA_SOAK_SECONDS")
    tenants, clients = (100, 8) if long else (24, 4)
    for number in range(tenants):
        name = f"t{number:03d}"
        shutil.copytree(TINY / ("gsm8k", "banking77")[number % 2], place / "in" / name)
        path = place / "in" / name / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 4 + number}))
    batch(place / "in", place / "library", Recipe(transform="none", budget=0.5, dtype="float32"), workers=0)
    names = sorted(path.name for path in (place / "in").iterdir())
    weights = [1 / (1 + rank) for rank in range(len(names))]
    failures: list[Any] = []
    seen: dict[str, set[tuple[int, ...]]] = {}
    asked = 0
    with serving(
        PYTHON, BASE, place, environment(place / "library", place), "--max-loras", "2", "--max-cpu-loras", "3"
    ) as soaked:
        ends = time.monotonic() + float(long or 30)

        def client(seed: int) -> None:
            nonlocal asked
            draw = random.Random(seed)
            while time.monotonic() < ends:
                (name,) = draw.choices(names, weights)
                answer = soaked.ask(name, PROMPTS[0], 8)
                asked += 1
                if answer.status != 200:
                    failures.append((name, answer))
                seen.setdefault(name, set()).add(answer.tokens)

        threads = [threading.Thread(target=client, args=(seed,)) for seed in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert soaked.get("/health")[0] == 200
    print(f"{asked} answers of {len(seen)} tenants")
    assert failures == []
    assert [name for name, answers in seen.items() if len(answers) != 1] == []
    assert len(seen) > len(names) // 2
