"""Prompts and base models of single adapters, from a manifest's columns: read, carried, kept in memory, part of the key."""

import json
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bslora_convert import Recipe, batch, compress
from bslora_convert.behaviour import loaded
from bslora_convert.behaviour.adapter import read_adapter
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.library.discovery import discover
from bslora_convert.library.engines import local
from bslora_convert.library.items import Item
from bslora_convert.library.jobs import Job
from bslora_convert.library.manifest import read_manifest
from bslora_convert.library.options import recipe_of
from tests.conftest import FIXTURES
from tests.library.making import tree
from tests.planting import random_products, write_lora

TINY = FIXTURES / "tiny"
BASE = TINY / "base"
RECIPE = Recipe(transform="none", budget=0.5)
NAMES = ("gsm8k", "banking77")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two real adapters, each with prompts of its own beside the manifest."""
    rows = []
    for name in NAMES:
        lines = (TINY / f"{name}-heldout.jsonl").read_text().splitlines()[:12]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        rows.append({"id": name, "uri": str(TINY / name), "prompts": f"{name}.jsonl", "base_model": str(BASE)})
    path = tmp_path / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of base models that are read from disk."""
    names: list[str] = []
    real = loaded.load_base

    def counted(name: Any, *rest: Any) -> BaseModel:
        names.append(Path(name).name)
        return real(name, *rest)

    monkeypatch.setattr(loaded, "load_base", counted)
    yield names
    assert loaded._kept == loaded._Kept()  # nothing stays behind


def test_columns_are_read_and_their_paths_start_from_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "bases" / "mine").mkdir(parents=True)
    (tmp_path / "list.csv").write_text(
        "id,uri,revision,prompts,base_model\na,x,,p/a.jsonl,bases/mine\nb,x,,,org/model\nc,x,,/abs.jsonl,./gone\n"
    )
    items = discover(str(tmp_path / "list.csv")).items
    assert [(item.prompts, item.base_model) for item in items] == [
        (str(tmp_path / "p/a.jsonl"), str(tmp_path / "bases/mine")), (None, "org/model"),
        ("/abs.jsonl", str(tmp_path / "gone")),
    ]  # fmt: skip
    for field, value, words in (
        ("prompts", 3, "line 1: prompts is int"), ("base_model", ["x"], "line 1: base_model is list"),
        ("prompts", "s3://x/y.jsonl", "line 1: prompts is .*not a URL"),
    ):  # fmt: skip
        (tmp_path / "list.jsonl").write_text(json.dumps({"id": "a", "uri": "x", field: value}) + "\n")
        with pytest.raises(InputError, match=words):
            discover(str(tmp_path / "list.jsonl"))


def test_they_stand_in_the_place_of_the_librarys() -> None:
    def own(recipe: dict[str, Any], **fields: str) -> list[Any]:
        made = recipe_of(Item("a", "x", **fields), recipe)
        return [made.get(name) for name in ("prompts", "finetune", "base_model")]

    both = {"prompts": "c", "finetune": "f", "base_model": "b"}
    assert own(both) == ["c", "f", "b"]
    assert own(both, prompts="p") == ["p", "p", "b"]
    assert own({"finetune": "f", "base_model": "b"}, prompts="p", base_model="o") == [None, "p", "o"]
    assert own({}, prompts="p", base_model="o") == ["p", None, "o"]
    assert own({}, base_model="o") == [None, None, None]  # nothing runs it
    assert own(both, base_model="o") == ["c", "f", "o"]
    with pytest.raises(RecipeError, match="a: it has prompts and no base model"):
        own({}, prompts="p")


def test_each_is_converted_with_its_own_on_a_base_that_is_read_once(
    manifest: Path, tmp_path: Path, loads: list[str]
) -> None:
    summary = batch(manifest, tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert (summary["ok"], loads) == (2, ["base"])
    for name in NAMES:
        recipe = Recipe(transform="none", budget=0.5, prompts=str(tmp_path / f"{name}.jsonl"), base_model=str(BASE))
        alone = tmp_path / "alone" / name
        compress(TINY / name, alone, recipe, report_html=False, recorded_as=str(TINY / name))
        for path in alone.iterdir():
            assert path.read_bytes() == (tmp_path / "out" / name / path.name).read_bytes(), path
    rows = {row["id"]: row for row in read_manifest(tmp_path / "out")}
    assert rows["gsm8k"]["prompts"] == str(tmp_path / "gsm8k.jsonl")
    assert rows["gsm8k"]["base_model"] == str(BASE)


def test_distillation_leaves_the_base_as_it_was(manifest: Path, tmp_path: Path, loads: list[str]) -> None:
    text = (tmp_path / "gsm8k.jsonl").read_text()
    recipe = Recipe(transform="none", budget=0.5, finetune=str(tmp_path / "gsm8k.jsonl"), base_model=str(BASE))
    batch(manifest, tmp_path / "out", recipe, workers=0, report_html=False)
    assert loads == ["base"]
    (tmp_path / "banking77.jsonl").write_text(text)
    alone = compress(TINY / "banking77", tmp_path / "alone", recipe, recorded_as="source")
    before = tree(tmp_path / "out")["gsm8k/adapter_model.safetensors"]
    again = batch(manifest, tmp_path / "out", recipe, workers=0, report_html=False)
    assert (again["ok"], again["skipped"]) == (1, 1)  # whose prompts changed is done again
    found = tree(tmp_path / "out")
    assert found["gsm8k/adapter_model.safetensors"] == before
    row = next(row for row in read_manifest(tmp_path / "out") if row["id"] == "banking77")
    assert row["settings"]["sha256"] == alone["compact"]["sha256"]


def test_what_is_wrong_with_one_stops_no_other(manifest: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    rows[0]["prompts"] = "nowhere.jsonl"
    rows[1] = {key: rows[1][key] for key in ("id", "uri", "prompts")}
    rows.append({"id": "plain", "uri": str(TINY / "gsm8k")})
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = batch(manifest, tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert (summary["ok"], summary["failed"]) == (1, 2)
    messages = {row["id"]: row["message"] for row in read_manifest(tmp_path / "out")}
    assert "nowhere.jsonl: no such file" in messages["gsm8k"]
    assert "no base model" in messages["banking77"]


def test_equal_adapters_with_other_prompts_are_no_copies(tmp_path: Path) -> None:
    for name in "ab":
        write_lora(tmp_path / name, random_products(layers=1))
    (tmp_path / "list.csv").write_text("id,uri,base_model\na,a,org/one\nb,b,org/two\n")
    summary = batch(tmp_path / "list.csv", tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert (summary["ok"], summary["duplicates"]) == (2, 0)


# ---------------------------------------------------------------------------------------------- the base that is kept


def test_nothing_is_kept_unless_it_is_asked_for(loads: list[str]) -> None:
    loaded.take_base(BASE, "cpu", "auto")
    with loaded.base_kept():
        first = loaded.take_base(BASE, "cpu", "auto")
        assert loaded.take_base(BASE, "cpu", "auto") is first
        assert loaded.take_base(BASE, "cpu", "bfloat16").model.dtype == torch.bfloat16  # another one takes its place
        assert loaded.take_base(BASE, "cpu", "auto") is not first
        loaded.drop_base()
        loaded.take_base(BASE, "cpu", "auto")
    assert len(loads) == 5


def test_a_workshop_that_is_closed_leaves_nothing_on_the_base() -> None:
    session = BaseModelSession(read_adapter(TINY / "gsm8k"), str(BASE), "cpu")
    model = session.base.model
    assert any(module._forward_hooks for module in model.modules())
    next(model.modules()).train()
    session.close()
    assert not any(module._forward_hooks or module._forward_pre_hooks or module.training for module in model.modules())


def test_what_the_kept_base_does_not_fit_is_refused(loads: list[str]) -> None:
    def refuse(_: nn.Module) -> None:
        raise InputError("another model")

    with loaded.base_kept():
        loaded.take_base(BASE, "cpu", "auto")
        with pytest.raises(InputError, match="another model"):
            loaded.take_base(BASE, "cpu", "auto", refuse)
    assert loads == ["base"]


def test_base_models_count_in_the_memory_of_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    from collections import deque

    def start(_: Any) -> local.Worker:
        ours, theirs = Pipe()
        ends.append(theirs)
        return local.Worker(None, ours)

    def job(name: str, base: str, size: int) -> Job:
        return Job(Item(name, "x"), "out", {"base_model": base}, {}, "", "", base_bytes=size)

    ends: list[Any] = []
    monkeypatch.setattr(local, "_start", start)
    monkeypatch.setattr(local, "PROCESS_BYTES", 0)
    waiting = deque([job("a", "one", 100), job("b", "one", 100), job("c", "two", 50)])
    running: list[local.Worker] = []
    work: Any = None
    local._hand_out(work, waiting, running, 4, room=399)
    assert [worker.used for worker in running] == [200]  # a second base would need 400
    local._hand_out(work, waiting, running, 4, room=400)
    assert [worker.job and worker.job.item.id for worker in running] == ["a", "b"]
    running[0].job = None  # its base is still there
    waiting.appendleft(job("d", "one", 100))
    local._hand_out(work, waiting, running, 4, room=400)
    assert running[0].job is not None
    assert (running[0].job.item.id, len(waiting)) == ("d", 1)
    running[1].job = None
    local._hand_out(work, waiting, running, 4, room=300)
    assert running[1].used == 100  # the other base takes the place of the first


def test_the_bytes_of_a_base_are_those_of_its_weights() -> None:
    from bslora_convert.files.base import base_bytes

    assert base_bytes(BASE) == sum(path.stat().st_size for path in BASE.glob("*.safetensors")) > 0
    assert base_bytes(None) == base_bytes("org/never-fetched") == base_bytes("no name at all/x/y") == 0
