"""`expand` and `verify` of whole libraries: what they say of one alone, for each; a broken one stops no other."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from bslora_convert import Recipe, batch, expand, expand_library, load_compact, load_lora, verify, verify_library
from bslora_convert.behaviour import loaded
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.bslora.storage import WEIGHTS_NAME
from bslora_convert.cli import main
from bslora_convert.errors import InputError, OutputError, RecipeError
from bslora_convert.modules.factors import Factors
from bslora_convert.recipe.verifying import VerifyOptions
from bslora_convert.verbs import verify as verify_verb
from bslora_convert.verbs.verify_library import cost
from tests.conftest import FIXTURES
from tests.planting import write_lora

TINY = FIXTURES / "tiny"
BASE, PROMPTS = TINY / "base", TINY / "gsm8k-heldout.jsonl"
NAMES = ("tenant-1/a", "tenant-1/b", "c")
QUICK: dict[str, Any] = {"base_model": BASE, "limit": 3, "max_new_tokens": 0}
FLAGS = ("--base-model", str(BASE), "--limit", "3", "--max-new-tokens", "0")


def mixed(seed: int) -> dict[str, Factors]:
    """A real adapter's updates with their components mixed: several of them have their spaces in common."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, module in load_lora(TINY / "gsm8k").modules.items():
        whole = module.factors()
        found[name] = Factors(whole.b @ torch.randn(whole.rank, whole.rank, generator=generator) / 4, whole.a)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapters of one base, converted."""
    root = tmp_path_factory.mktemp("libraries")
    for seed, name in enumerate(NAMES):
        write_lora(root / "in" / name, mixed(seed), base_model_name_or_path="fixtures/tiny/base")
    batch(root / "in", root / "out", Recipe(transform="none", budget=0.5), workers=0)
    return root / "out"


@pytest.fixture
def library(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "library")
    return tmp_path / "library"


def damage(library: Path, name: str) -> None:
    weights = library / name / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-7])


def run(*words: str) -> Any:
    return CliRunner().invoke(main, [*map(str, words)])


# ---------------------------------------------------------------------------------------------- expand


def test_every_adapter_is_expanded_as_it_is_alone(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "served"
    result = expand_library(library, out, dtype="float32")
    assert [row["id"] for row in result["rows"]] == sorted(NAMES)
    assert (result["bad"], result["rank"]) == (0, max(row["ranks"]["max"] for row in result["rows"]))
    for name in NAMES:
        expand(library / name, tmp_path / "alone" / name, dtype="float32")
        for path in (tmp_path / "alone" / name).iterdir():
            assert path.read_bytes() == (out / name / path.name).read_bytes(), path
        form, lora = load_compact(library / name).form, load_lora(out / name)
        for module, factors in lora.modules.items():
            delta = form.delta(module)
            assert torch.allclose(factors.factors().b @ factors.factors().a, delta.b @ delta.a, atol=1e-5)


def test_a_broken_adapter_is_a_row_and_exit_code_1(library: Path, tmp_path: Path) -> None:
    damage(library, "c")
    done = run("expand", library, tmp_path / "out", "--json")
    assert done.exit_code == 1
    rows = {row["id"]: row for row in json.loads(done.stdout)["rows"]}
    assert (rows["c"]["status"], rows["tenant-1/a"]["status"]) == ("failed", "ok")
    assert "truncated" in rows["c"]["message"]
    assert not (tmp_path / "out" / "c").exists()
    assert load_lora(tmp_path / "out" / "tenant-1" / "b").modules
    shown = run("expand", library, tmp_path / "shown")
    assert shown.exit_code == 1
    assert "tenant-1/a" in shown.stdout
    assert "c: " in shown.stdout
    assert "2 of 3 adapters" in shown.stdout


def test_a_library_lands_in_a_new_or_empty_place(library: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    for refused in (run("expand", library, out), run("expand", library, library / "served")):
        assert refused.exit_code == 2
    with pytest.raises(OutputError, match="not empty"):
        expand_library(library, out)
    with pytest.raises(InputError, match="inside of the source"):
        expand_library(library, library / "served", overwrite=True)
    assert [path.name for path in out.iterdir()] == ["mine"]
    expand_library(library, out, overwrite=True)
    (out / "c" / "notes.txt").write_text("mine")
    again = run("expand", library, out, "--overwrite", "--rank", "2", "--json")
    rows = {row["id"]: row for row in json.loads(again.stdout)["rows"]}
    assert (again.exit_code, rows["tenant-1/a"]["ranks"]["max"]) == (1, 2)
    assert "notes.txt" in rows["c"]["message"]  # what is not ours stays, and what stands beside it
    assert (out / "mine").read_text() == "x"
    assert (out / "c" / "notes.txt").read_text() == "mine"
    with pytest.raises(RecipeError, match="rank is 0"):
        expand_library(library, tmp_path / "other", rank=0)


def test_what_was_taken_away_is_no_failure(library: Path, tmp_path: Path) -> None:
    shutil.rmtree(library / "c")
    done = run("expand", library, tmp_path / "out")
    assert done.exit_code == 0
    assert "1 adapters of the manifest are not there any more" in done.stderr
    for name in ("tenant-1/a", "tenant-1/b"):
        shutil.rmtree(library / name)
    assert run("expand", library, tmp_path / "empty").exit_code == 2


# ---------------------------------------------------------------------------------------------- verify


def test_every_adapter_is_measured_on_a_base_that_is_read_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    real = loaded.load_base

    def counted(*given: Any) -> Any:
        loads.append(given[0])
        return real(*given)

    monkeypatch.setattr(loaded, "load_base", counted)
    result = verify_library(library, prompts=PROMPTS, **QUICK)
    assert len(loads) == 1
    assert loaded._kept.base is None
    assert [row["retention"] for row in result["rows"]] == sorted(row["retention"] for row in result["rows"])
    assert result["retention"]["min"] == result["rows"][0]["retention"]
    assert (result["passed"], result["bad"], result["missed"], result["adapters"]) == (True, [], [], 3)
    for row in result["rows"]:
        alone = verify(library / row["id"], prompts=PROMPTS, **QUICK)
        assert {name: row[name] for name in ("kl", "kl_ci95", "base_kl", "agreement", "hidden_error")} == {
            name: alone[name] for name in ("kl", "kl_ci95", "base_kl", "agreement", "hidden_error")
        }
        assert not (library / row["id"] / "verify.json").exists()


def test_thresholds_hold_for_each_and_results_are_kept_in_each(library: Path) -> None:
    measured = verify_library(library, prompts=PROMPTS, **QUICK)
    worst, middle = (row["retention"] for row in measured["rows"][:2])
    words = ("verify", library, "--prompts", PROMPTS, *FLAGS, "--save", "--min-retention", (worst + middle) / 2)
    done = run(*words)
    assert done.exit_code == 1
    assert f"missed: 1 of 3 adapters, {measured['rows'][0]['id']}" in done.stderr
    first, second = (done.stdout.index(f"│ {row['id']} ") for row in measured["rows"][:2])
    assert first < second
    assert f"at least {worst:.2%} of an adapter's effect is kept" in done.stdout
    for row in measured["rows"]:
        kept = json.loads((library / row["id"] / "verify.json").read_text())
        assert kept["kl"] == row["kl"]
        assert "How it behaves" in (library / row["id"] / "report.html").read_text()


def test_one_that_is_broken_or_can_not_be_saved_stops_no_other(library: Path) -> None:
    damage(library, "c")
    (library / "tenant-1" / "a" / "verify.json").write_text("{}")
    done = run("verify", library, "--prompts", PROMPTS, *FLAGS, "--save", "--json")
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert (result["bad"], result["passed"]) == (["c", "tenant-1/a"], False)
    assert "kl" not in result["rows"][-1]
    assert (library / "tenant-1" / "b" / "verify.json").is_file()


def test_prompts_may_be_each_adapters_own(tmp_path: Path) -> None:
    for name, file in (("gsm8k", PROMPTS), ("banking77", TINY / "banking77-heldout.jsonl")):
        lines = file.read_text().splitlines()[:4]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    rows = [
        {"id": name, "uri": str(TINY / name), "prompts": f"{name}.jsonl", "base_model": str(BASE)}
        for name in ("gsm8k", "banking77")
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    batch(tmp_path / "list.jsonl", tmp_path / "out", Recipe(transform="none", budget=0.5), workers=0)
    result = verify_library(tmp_path / "out", max_new_tokens=0)
    for row in result["rows"]:
        alone = verify(tmp_path / "out" / row["id"], TINY / row["id"], BASE, prompts=tmp_path / f"{row['id']}.jsonl",
                       max_new_tokens=0)  # fmt: skip
        assert (row["prompts"], row["kl"]) == (alone["prompts"], alone["kl"])
    shared = verify_library(tmp_path / "out", prompts=tmp_path / "gsm8k.jsonl", max_new_tokens=0)
    assert {row["prompts"]["sha256"] for row in shared["rows"]} == {
        row["prompts"]["sha256"] for row in result["rows"] if row["id"] == "gsm8k"
    }


def test_what_a_library_can_not_be_asked(library: Path, tmp_path: Path) -> None:
    for options, words in (
        ({"prompts": PROMPTS, "out": tmp_path / "x.json"}, "out is of one adapter"),
        ({"prompts": PROMPTS, "reference": TINY / "gsm8k"}, "reference is of one adapter"),
        ({}, "names no prompts"), ({"prompts": PROMPTS, "limit": 0}, "limit is 0"),
        ({"prompts": PROMPTS, "max_accuracy_drop": 0.1}, "max_accuracy_drop needs tasks"),
        ({"prompts": PROMPTS, "min_retention": 7.0}, "min_retention is 7.0"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            verify_library(library, **options)
    done = run("verify", library, "--prompts", PROMPTS, "--out", tmp_path / "x.json")
    assert (done.exit_code, "--out is of one adapter" in done.stderr) == (2, True)


def test_what_all_adapters_have_in_common_is_run_once(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    whole = BaseModel.predictions

    def counted(self: BaseModel, batch: Any, *rest: Any, **options: Any) -> Any:
        runs.append(len(batch.examples))
        return whole(self, batch, *rest, **options)

    monkeypatch.setattr(BaseModel, "predictions", counted)
    found = verify_library(library, prompts=PROMPTS, **QUICK)
    assert sum(runs) == (1 + 2 * len(NAMES)) * 3  # the bare base once, each original and each compact adapter
    alone = verify(library / NAMES[0], prompts=PROMPTS, **QUICK)
    assert next(row for row in found.rows if row["id"] == NAMES[0])["retention"] == pytest.approx(
        alone.retention, rel=1e-6
    )


def test_a_completion_that_the_original_wrote_is_not_generated_again(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "open.jsonl"
    first = [json.loads(line) for line in PROMPTS.read_text().splitlines()[:3]]
    rows.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in first))
    asked: list[int] = []
    whole = verify_verb.generate
    monkeypatch.setattr(
        verify_verb, "generate", lambda base, rows, *rest: (asked.append(len(rows)), whole(base, rows, *rest))[1]
    )
    found = verify(library / "c", base_model=BASE, prompts=rows, max_new_tokens=5)
    assert asked == [0, 3]  # the original has written its own; the compact adapter's are compared
    assert found.generation is not None
    assert found.prompts is not None
    assert (found.generation.rows, found.prompts.completions_written) == (3, 3)
    said = cost(library, VerifyOptions(prompts=rows, max_new_tokens=5, base_model=BASE))
    assert said == (
        "3 adapters, 9 rows in all; 9 of them have no completion, and each adapter's original writes it first, 5 tokens at most"
    )
    assert cost(library, VerifyOptions(prompts=PROMPTS, limit=2)) == "3 adapters, 6 rows in all"
