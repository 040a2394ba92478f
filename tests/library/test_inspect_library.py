"""`inspect` of a library: who its tenants are, what is damaged, and whom a server would refuse, before one is started."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bslora_convert import Recipe, batch, inspect_library, verify, verify_library
from bslora_convert.cli import main
from bslora_convert.library.manifest import read_manifest
from bslora_convert.results.library import BatchSummary
from tests.conftest import FIXTURES
from tests.planting import random_products, write_lora

TINY = FIXTURES / "tiny"
BASE = TINY / "base"
PROMPTS = TINY / "gsm8k-heldout.jsonl"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("inspected")
    for name, source in (("team/math", "gsm8k"), ("bank", "banking77"), ("other", "gsm8k")):
        shutil.copytree(TINY / source, root / "in" / name)
    config = root / "in" / "other" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": "D:\\x\\Gemma_3"}))
    write_lora(root / "in" / "small", random_products(rank=2), base_model_name_or_path="somewhere/base")
    batch(root / "in", root / "out", Recipe(transform="none", budget=0.5), workers=0)
    return root / "out"


@pytest.fixture
def library(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "library")
    return tmp_path / "library"


def test_an_overview(library: Path) -> None:
    weights = library / "bank" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    found = inspect_library(library)
    assert (found.adapters, found.damaged, found.server) == (4, ["bank"], None)
    assert found.bases == {"fixtures/tiny/base": 2, "D:\\x\\Gemma_3": 1, "somewhere/base": 1}
    assert [row["id"] for row in found.rows] == ["bank", "other", "small", "team/math"]
    assert found.bytes == sum(row["bytes"] for row in read_manifest(library))
    done = CliRunner().invoke(main, ["inspect", str(library)])
    assert done.exit_code == 0, done.stderr
    for words in ("4 adapters", "1 for D:\\x\\Gemma_3", "team/math", "Damaged: bank: ", "--lora-target-modules"):
        assert words in done.stdout
    assert inspect_library(library / "team").adapters == 1  # a part of one, without a manifest


@pytest.mark.parametrize(
    ("options", "aliases", "refused"),
    [
        ({}, "", {"other": "for the base model D:", "small": "made for a model of another size"}),
        ({}, "gemma-3", {"other": "", "small": "made for a model of another size"}),
        (
            {"max_lora_rank": 1},
            "gemma-3",
            {"bank": "--max-lora-rank is 1", "team/math": "rank is", "small": "", "other": "rank is"},
        ),
    ],
)
def test_whom_a_server_would_refuse(
    library: Path, options: dict[str, Any], aliases: str, refused: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BSLORA_BASE_ALIASES", aliases)
    found = inspect_library(library, str(BASE), **options)
    assert found.server is not None
    said = {one["id"]: one["why"] for one in found.server.refused}
    for name, words in refused.items():
        assert words in said.get(name, ""), said
        assert (name in said) or words == ""
    assert found.server.needed_rank == 8
    rank = ["--max-lora-rank", "1"] if options else []
    done = CliRunner().invoke(main, ["inspect", str(library), "--base-model", str(BASE), *rank, "--json"])
    assert done.exit_code == 1
    assert {one["id"] for one in json.loads(done.stdout)["server"]["refused"]} == set(said)


def test_nobody_refused_is_exit_code_0(library: Path) -> None:
    for name in ("other", "small"):
        shutil.rmtree(library / name)
    done = CliRunner().invoke(main, ["inspect", str(library), "--base-model", str(BASE), "--max-lora-rank", "8"])
    assert done.exit_code == 0, done.stdout
    assert "would serve 2 of 2 adapters" in done.stdout
    assert "2 adapters of the manifest are not there any more" in done.stderr


def test_wrong_questions(library: Path) -> None:
    for words, said in (
        (["--max-lora-rank", "8"], "with --base-model"),
        (["--base-model", str(BASE), "--max-lora-rank", "9"], "--max-lora-rank is 9"),
    ):
        done = CliRunner().invoke(main, ["inspect", str(library), *words])
        assert done.exit_code == 2
        assert said in done.stderr
    done = CliRunner().invoke(main, ["inspect", str(library / "bank"), "--base-model", str(BASE)])
    assert done.exit_code == 2
    assert "this is an adapter" in done.stderr


def test_what_was_measured_stands_in_manifest_summary_and_page(library: Path) -> None:
    rows = {"prompts": PROMPTS, "limit": 2, "max_new_tokens": 0, "base_model": str(BASE)}
    for name in ("other", "small"):
        shutil.rmtree(library / name)
    before = (library / "report.html").read_text()
    assert "Behaviour has not been measured here" in before
    verify(library / "bank", save=True, **rows)
    found = {row["id"]: row["behaviour"] for row in read_manifest(library)}
    assert found["team/math"] is None
    assert found["bank"] is not None
    assert found["bank"]["rows"] == 2 and found["bank"]["when"] and 0 < found["bank"]["retention"] <= 1
    assert "Not measured yet:" in (library / "report.html").read_text()
    measured = verify_library(library, save=True, overwrite=True, **rows)
    summary = BatchSummary.from_dict(json.loads((library / "summary.json").read_text()))
    assert summary.behaviour is not None
    assert summary.behaviour["measured"] == 2
    assert summary.behaviour["retention"]["min"] == measured.retention["min"]  # type: ignore[index]
    page = (library / "report.html").read_text()
    behaviour = page[page.index("Behaviour, the worst first") :]
    order = [row["id"] for row in measured.rows]
    assert behaviour.index(f">{order[0]}</a>") < behaviour.index(f">{order[1]}</a>")
    assert inspect_library(library).behaviour == summary.behaviour
    assert "98" in (library / "README.md").read_text() or "99" in (library / "README.md").read_text()


def test_a_manifest_of_somebody_else_does_not_cost_a_measurement(library: Path, tmp_path: Path) -> None:
    rows = {"prompts": PROMPTS, "limit": 1, "max_new_tokens": 0, "base_model": str(BASE)}
    shutil.copytree(library / "bank", tmp_path / "work" / "single")
    (tmp_path / "work" / "manifest.jsonl").write_text('{"audio_filepath": "x"}\n')
    assert verify(tmp_path / "work" / "single", save=True, **rows).retention is not None
    summary = json.loads((library / "summary.json").read_text())
    del summary["bases"]
    (library / "summary.json").write_text(json.dumps(summary))
    found = verify(library / "bank", save=True, **rows)
    assert any("not in the library's own files" in note for note in found.notes)
    assert found.retention is not None
