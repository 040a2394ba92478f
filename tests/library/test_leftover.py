"""The manifest says who is a tenant: results whose source left the library are named, and pruned if nobody touched them."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bslora_convert import Recipe, batch, expand_library
from bslora_convert.cli import main
from bslora_convert.errors import InputError
from bslora_convert.library.manifest import is_library, read_manifest, tenants
from bslora_convert.results.library import BatchPlan, BatchSummary
from tests.planting import random_products, write_lora

RECIPE = Recipe(transform="none", budget=0.5)
NAMES = ("a", "team/one", "team/two", "z")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    for seed, name in enumerate(NAMES):
        write_lora(tmp_path / "in" / name, random_products(layers=1, rank=2, seed=seed))
    batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0)
    return tmp_path


def again(place: Path, **options: bool) -> BatchSummary:
    found = batch(place / "in", place / "out", RECIPE, workers=0, **options)
    assert isinstance(found, BatchSummary)
    return found


def test_what_has_left_is_named_and_is_no_tenant(place: Path) -> None:
    shutil.rmtree(place / "in" / "team")
    plan = batch(place / "in", place / "out", RECIPE, workers=0, dry_run=True)
    assert isinstance(plan, BatchPlan)
    assert plan.left_over == ["team/one", "team/two"]
    found = again(place)
    assert (found.left_over, found.pruned) == (["team/one", "team/two"], [])
    assert [row["id"] for row in read_manifest(place / "out")] == ["a", "z"]
    assert [row["id"] for row in expand_library(place / "out", place / "lora").rows] == ["a", "z"]
    done = CliRunner().invoke(main, ["batch", str(place / "out"), "--resume"])
    assert done.exit_code == 0, done.stderr
    assert "Left over: team/one, team/two" in done.stdout and "--prune removes them" in done.stdout
    assert "2 left over" in (place / "out" / "report.html").read_text()


def test_prune_removes_what_batch_wrote_and_nobody_changed(place: Path) -> None:
    for name in NAMES[1:]:
        shutil.rmtree(place / "in" / name)
    (place / "out" / "z" / "notes.txt").write_text("mine")
    foreign = place / "out" / "somebodys"
    shutil.copytree(place / "out" / "a", foreign)
    found = again(place, prune=True)
    assert found.pruned == ["team/one", "team/two"]
    assert found.left_over == ["somebodys", "z"]
    assert not (place / "out" / "team").exists()
    assert (place / "out" / "z" / "notes.txt").read_text() == "mine"
    assert (foreign / "adapter_config.json").is_file()
    assert any("somebodys" in note and "not written by `batch`" in note for note in found.notes)
    assert any("z is no adapter" in note and "notes.txt" in note for note in found.notes)
    assert not list((place / "out" / ".batch").glob("pruned-*"))
    write_lora(place / "in" / "team" / "one", random_products(layers=1, rank=2, seed=1))
    assert again(place).ok == 1  # it comes back as any new one


def test_damaged_leftovers_stay(place: Path) -> None:
    shutil.rmtree(place / "in" / "z")
    weights = place / "out" / "z" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    found = again(place, prune=True)
    assert (found.pruned, found.left_over) == ([], ["z"])
    assert weights.is_file()


def test_a_directory_without_a_manifest_is_what_it_holds(place: Path) -> None:
    for name in ("manifest.jsonl", "summary.json"):
        (place / "out" / name).unlink()
    assert is_library(place / "out")
    assert not is_library(place / "out" / "a")
    assert not is_library(place / "in")
    rows, (note,) = tenants(place / "out")
    assert [row["id"] for row in rows] == list(NAMES)
    assert "no manifest.jsonl" in note
    assert all(row["settings"]["width"] for row in rows)
    assert any("no manifest.jsonl" in said for said in expand_library(place / "out", place / "lora").notes)
    done = CliRunner().invoke(main, ["capacity", str(place / "out"), "--gpu-gib", "2", "--base-gib", "1", "--json"])
    assert done.exit_code == 0, done.stderr
    assert "no manifest.jsonl" in done.stderr
    (place / "out" / "a" / "fidelity.json").unlink()
    lacking = next(row for row in tenants(place / "out")[0] if row["id"] == "a")
    assert lacking["bytes"] and "width" not in lacking["settings"]


def test_the_manifests_rows_say_what_serving_depends_on(place: Path) -> None:
    row = json.loads((place / "out" / "manifest.jsonl").read_text().splitlines()[0])
    assert row["settings"]["target_modules"] == [
        "down_proj",
        "gate_proj",
        "k_proj",
        "o_proj",
        "q_proj",
        "up_proj",
        "v_proj",
    ]
    card = (place / "out" / "README.md").read_text()
    assert (
        "| [team/one](./team/one) |" in card and "BSLORA_LIBRARY=THIS_DIR" in card and "--lora-target-modules" in card
    )


def test_a_source_that_may_come_back_is_not_pruned(place: Path) -> None:
    away = place / "elsewhere"
    shutil.move(place / "in" / "team", away)
    (place / "in" / "team").symlink_to(away)
    assert again(place).left_over == []
    away.rename(place / "gone")
    found = again(place, prune=True)
    assert found.pruned == []
    assert any("team/one was left: team leads to nothing now" in note for note in found.notes)
    assert (place / "out" / "team" / "one" / "adapter_config.json").is_file()


def test_a_directory_that_can_not_be_read_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (place / "out" / "manifest.jsonl").read_bytes()
    whole = os.scandir

    def failing(path: str | Path) -> Any:
        if str(path).endswith("/in/team"):
            raise OSError(5, "Input/output error", str(path))
        return whole(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(InputError, match=r"team: can't be read .*nothing was changed"):
        again(place, prune=True)
    assert (place / "out" / "manifest.jsonl").read_bytes() == before


def test_what_failed_last_is_pruned_too(place: Path) -> None:
    weights = place / "in" / "a" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    assert again(place).failed == 1
    shutil.rmtree(place / "in" / "a")
    assert again(place, prune=True).pruned == ["a"]


def test_tenants_that_a_run_did_not_come_to_stay(place: Path) -> None:
    other = Recipe(transform="none", budget=0.3)
    found = batch(place / "in", place / "out", other, workers=0, overwrite=True, shard=(1, 2))
    assert isinstance(found, BatchSummary)
    assert (found.ok, found.pending) == (2, 2)
    assert [row["id"] for row in read_manifest(place / "out")] == list(NAMES)
    assert len(expand_library(place / "out", place / "lora").rows) == 4


@pytest.mark.parametrize(
    "row", [{"id": "a"}, {"id": "../a", "status": "ok"}, {"id": "a", "status": "ok", "settings": 3}, {"id": 3}]
)
def test_a_row_that_batch_does_not_write_is_damage(place: Path, row: dict[str, Any]) -> None:
    with (place / "out" / "manifest.jsonl").open("a") as manifest:
        manifest.write(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="line 5 is damaged"):
        tenants(place / "out")
