"""What a library has in common and a result needs, whatever becomes of either: carried along, looked for, made again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM

import bslora_convert.peft  # noqa: F401  registers the tuner
from bslora_convert import Recipe, batch, compress, finetune, load_compact
from bslora_convert.bslora.common import commons_in, named_in
from bslora_convert.cli import main
from bslora_convert.errors import InputError, ThresholdMissed
from bslora_convert.recipe.training import Training
from tests.conftest import FIXTURES
from tests.planting import UNKNOWN, drawn_lora, forget_draws, siblings

TINY = FIXTURES / "tiny"
RECIPE = Recipe(transform="none", max_error=0.2)
COUNT = 4


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lost")
    siblings(root / "in", TINY / "gsm8k", COUNT)
    drawn_lora(TINY / "gsm8k", root / "in" / "a/b/c/d/e/f/g/h/i/deep", UNKNOWN, trained=9)
    batch(root / "in", root / "out", RECIPE, workers=0, report_html=False)
    assert len(commons_in(root / "out")) == 1
    return root


@pytest.fixture
def place(library: Path, tmp_path: Path) -> Path:
    """A copy of the library."""
    shutil.copytree(library, tmp_path / "library")
    return tmp_path / "library"


@pytest.fixture(autouse=True)
def forgotten() -> None:
    """A process that has read nothing yet."""
    forget_draws()


def test_a_deep_tenant_and_a_linked_one_are_read(place: Path) -> None:
    assert load_compact(place / "out" / "a/b/c/d/e/f/g/h/i/deep").initial is not None
    forget_draws()
    (place / "link").symlink_to(place / "out" / "t0")
    assert load_compact(place / "link").initial is not None


def test_what_is_in_memory_is_still_looked_for(place: Path, tmp_path: Path) -> None:
    load_compact(place / "out" / "t0")
    shutil.copytree(place / "out" / "t0", tmp_path / "alone")
    with pytest.raises(InputError, match="copy it beside"):
        load_compact(tmp_path / "alone")


def test_distillation_takes_it_along(place: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((TINY / "gsm8k-heldout.jsonl").read_text().splitlines(keepends=True)[:12]))
    record = finetune(
        place / "out" / "t0", tmp_path / "new" / "t0", reference=place / "in" / "t0", base_model=str(TINY / "base"), prompts=rows,
        training=Training(max_steps=2), report_html=False,
    )  # fmt: skip
    (common,) = commons_in(place / "out")
    assert record.initialisation is not None
    assert record.initialisation.file == common.name
    forget_draws()
    assert load_compact(tmp_path / "new" / "t0").initial is not None
    assert [path.name for path in commons_in(tmp_path / "new")] == [common.name]


def test_what_peft_saves_is_whole(place: Path, tmp_path: Path) -> None:
    tuned = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY / "base"), str(place / "out" / "t0")
    ).eval()
    ids = torch.arange(2, 18)[None]
    with torch.no_grad():
        wanted = tuned(input_ids=ids).logits
        tuned.save_pretrained(tmp_path / "saved")
        shutil.rmtree(place)
        forget_draws()
        again = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(TINY / "base"), str(tmp_path / "saved")
        ).eval()
        assert torch.equal(again(input_ids=ids).logits, wanted)


def test_what_is_pushed_is_whole(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, out = place / "in" / "t0", tmp_path / "out" / "t1"
    command = [
        "compress",
        str(place / "in" / "t1"),
        str(out),
        "--transform",
        "none",
        "--init",
        str(begun),
        "--json",
        "-q",
    ]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    (common,) = commons_in(tmp_path / "out")
    done = CliRunner().invoke(main, ["push", str(out), "org/name", "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)["names"]) == {*(path.name for path in out.iterdir()), common.name} - {
        "report.html"
    }


@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_a_library_that_lost_its_file_is_made_again(place: Path, damage: str) -> None:
    (common,) = commons_in(place / "out")
    whole = common.read_bytes()
    common.unlink()
    if damage == "truncated":
        common.write_bytes(whole[:-8])
    summary = batch(place / "in", place / "out", RECIPE, workers=0, report_html=False)
    assert (summary.ok, summary.skipped) == (COUNT + 1, 0)
    assert common.read_bytes() == whole
    forget_draws()
    for number in range(COUNT):
        assert load_compact(place / "out" / f"t{number}").initial is not None


def test_a_file_that_nobody_names_is_not_counted(place: Path) -> None:
    summary = batch(place / "in", place / "out", RECIPE.but(init="none"), workers=0, report_html=False, overwrite=True)
    assert commons_in(place / "out")
    assert summary.bytes_in_common == 0


def test_a_failed_conversion_leaves_no_file(place: Path, tmp_path: Path) -> None:
    begun = str(place / "in" / "t0")
    with pytest.raises(ThresholdMissed):
        compress(
            place / "in" / "t1", tmp_path / "new" / "t1", RECIPE.but(init=begun, max_error=1e-6), report_html=False
        )
    assert list((tmp_path / "new").iterdir()) == []


def test_an_adapter_that_went_on_from_another_is_let_be_and_said(place: Path, tmp_path: Path) -> None:
    shutil.copytree(TINY / "banking77", place / "in" / "stranger")
    recipe = RECIPE.but(init=str(place / "in" / "t0"))
    summary = batch(place / "in", tmp_path / "out", recipe, workers=0, report_html=False)
    assert summary.ok == COUNT + 2
    for name, noted in (("stranger", True), ("t1", False)):
        notes = json.loads((tmp_path / "out" / name / "fidelity.json").read_text())["notes"]
        assert any("it was coded without" in note for note in notes) == noted
        config = json.loads((tmp_path / "out" / name / "adapter_config.json").read_text())
        assert (named_in(config) is None) == noted


def test_what_training_went_on_from_counts_by_its_content(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    shutil.copytree(place / "in" / "t0", place / "v1")
    recipe = RECIPE.but(init="v1")
    batch("in", tmp_path / "out", recipe, workers=0, report_html=False)
    monkeypatch.chdir(tmp_path)
    again = batch(place / "in", tmp_path / "out", recipe.but(init=str(place / "v1")), workers=0, report_html=False)
    assert again.skipped == COUNT + 1
    shutil.copy(place / "in" / "t2" / "adapter_model.safetensors", place / "v1")
    changed = batch(
        place / "in", tmp_path / "out", recipe.but(init=str(place / "v1")), workers=0, report_html=False, overwrite=True
    )
    assert changed.ok == COUNT + 1
