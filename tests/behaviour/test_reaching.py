"""A behaviour that is asked for: the smallest file has it on rows that nobody looked at before, or the miss is told."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from bslora_convert.behaviour.known import Known
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.prompts import Prompts, batches
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.errors import RecipeError, ThresholdMissed
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.training import Training
from bslora_convert.verbs.batch import batch
from bslora_convert.verbs.compress import compress
from bslora_convert.verbs.verify import verify
from tests.behaviour.conftest import BASE, LORA, PROMPTS

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows of the 64."""
    few = tmp_path_factory.mktemp("rows") / "few.jsonl"
    few.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[:30]))
    return few


def recipe(rows: Path, **options: Any) -> Recipe:
    plain = {"transform": "none", "metric": "input", "base_model": str(BASE), "prompts": str(rows)}
    return Recipe(**plain | options)


@pytest.mark.parametrize(
    "aim",
    [
        {"min_retention": 0.98},
        pytest.param({"max_kl": 0.02}, marks=pytest.mark.slow),
        pytest.param({"min_agreement": 0.9}, marks=pytest.mark.slow),
    ],
)
def test_the_smallest_file_that_reaches_it(tmp_path: Path, rows: Path, aim: dict[str, float]) -> None:
    record = compress(LORA, tmp_path / "out", recipe(rows, **aim))
    ((name, limit),) = aim.items()
    measure = {"min_retention": "retention", "max_kl": "kl", "min_agreement": "agreement"}[name]
    found = record["aim"]
    assert found["asked"] == aim
    assert record["recipe"][name] == limit

    def reaches(value: float) -> bool:
        return value <= limit if name == "max_kl" else value >= limit

    (kept,) = (step for step in found["path"] if step["kept"])
    assert kept["bytes"] == record["compact"]["bytes"]
    assert kept["met"] and reaches(kept["bound"])
    assert found["proofs"][-1]["met"] and reaches(found["proofs"][-1][measure])
    smaller = [step for step in found["path"] if step["met"] and step["bytes"] < kept["bytes"]]
    assert bool(smaller) == (len(found["proofs"]) > 1)  # one that choosing rows liked and proving rows did not
    assert record["evidence"]["proof"] == found["proofs"][-1]
    assert (tmp_path / "out" / WEIGHTS).stat().st_size == record["compact"]["bytes"]
    assert f"--{name.replace('_', '-')} {limit:g}" in (tmp_path / "out" / "report.html").read_text()
    checked = verify(tmp_path / "out", prompts=rows, max_new_tokens=0)
    if name == "min_retention":  # few rows say little of the KL of all
        assert checked[measure] > 0.9
    assert any("too few for its interval" in note for note in record["notes"])


def test_a_size_that_is_far_off_does_not_choose_the_metric(tmp_path: Path, rows: Path) -> None:
    record = compress(LORA, tmp_path / "out", recipe(rows, metric="auto", min_retention=0.9), report_html=False)
    chosen, path = record["evidence"]["metric"], record["aim"]["path"]
    assert path[0]["retention"] < 0.7  # the first guess was far too small
    where = next(step for step in path if step["kl"] == chosen["kl"][chosen["kept"]])
    assert where["retention"] > 0.7
    assert chosen["kl"][chosen["kept"]] == min(chosen["kl"].values())


def test_a_miss_says_what_was_reached_and_leaves_nothing(tmp_path: Path, rows: Path) -> None:
    with pytest.raises(ThresholdMissed, match=r"not reached on the 6 validation rows.* more rows of --prompts"):
        compress(LORA, tmp_path / "out", recipe(rows, min_agreement=0.9999))
    assert not list(tmp_path.iterdir())


def test_an_error_that_is_asked_for_is_met_on_a_base_model_too(tmp_path: Path, rows: Path) -> None:
    record = compress(LORA, tmp_path / "met", recipe(rows, max_error=0.2), report_html=False)
    assert record["weight"]["relative_error"] <= 0.2
    with pytest.raises(ThresholdMissed, match="finer than codes can hold"):
        compress(LORA, tmp_path / "missed", recipe(rows, max_error=1e-5), report_html=False)
    with pytest.raises(RecipeError, match=r"max_error is 0\.2: finetune"):
        compress(LORA, tmp_path / "tuned", recipe(rows, max_error=0.2, finetune=True), report_html=False)
    assert [path.name for path in tmp_path.iterdir()] == ["met"]


@pytest.mark.slow
def test_a_smaller_one_is_tried_distilled(tmp_path: Path, rows: Path) -> None:
    asked = recipe(rows, min_retention=0.97)
    plain = compress(LORA, tmp_path / "plain", asked, report_html=False)
    training = Training(max_steps=8, learning_rate=3e-3, evaluate_every=4, train="all")
    tuned = compress(LORA, tmp_path / "tuned", asked.but(finetune=True), training=training, report_html=False)
    assert [step["distilled"] for step in tuned["aim"]["path"]].count(True) == 1
    if tuned["aim"]["path"][-1]["met"]:
        assert tuned["compact"]["bytes"] < plain["compact"]["bytes"]
        assert tuned["training"]["kept_step"] > 0
    assert tuned["aim"]["proofs"][-1]["met"]


def test_a_behaviour_needs_prompts(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="min_retention is measured on prompts"):
        compress(LORA, tmp_path / "out", Recipe(min_retention=0.99), report_html=False)
    with pytest.raises(RecipeError, match="max_kl is 0"):
        Recipe(max_kl=0)
    with pytest.raises(RecipeError, match="exclude each other"):
        Recipe(max_kl=0.1, bytes=0.1)


def test_a_library_whose_manifest_names_the_prompts(tmp_path: Path, rows: Path) -> None:
    manifest = tmp_path / "library.jsonl"
    items = [
        {"id": "one", "uri": str(LORA), "prompts": str(rows), "base_model": str(BASE)},
        {"id": "two", "uri": str(LORA)},
    ]
    manifest.write_text("".join(json.dumps(item) + "\n" for item in items))
    summary = batch(str(manifest), tmp_path / "out", Recipe(transform="none", min_retention=0.95), workers=0)
    assert summary["run"]["bad"] == 1
    record = json.loads((tmp_path / "out" / "one" / "fidelity.json").read_text())
    assert record["aim"]["proofs"][-1]["met"]
    failed = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert "min_retention is measured on prompts" in next(row for row in failed if row["id"] == "two")["message"]


# ------------------------------------------------------------------------------------------ what is known of rows


def test_logits_are_formed_anew_from_hidden_states(session: BaseModelSession) -> None:
    examples = session.encode(Prompts.read(PROMPTS, 12)).examples
    known = Known(session.base, session.reference)
    for batch_ in batches(examples, 4, session.base.pad):
        first, second = known.predictions(batch_), known.predictions(batch_)
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    shuffled = next(batches(examples, 12, session.base.pad))
    with session.reference:
        exact = session.base.predictions(shuffled)
    for ours, theirs in zip(known.predictions(shuffled), exact, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_what_a_model_does_behind_its_head_is_done(session: BaseModelSession) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(session.base.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.5,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).eval()
    base = BaseModel("gemma", model, session.base.tokenizer, torch.device("cpu"))
    examples = session.encode(Prompts.read(PROMPTS, 4)).examples
    known = Known(base, nullcontext())
    taken = next(batches(examples, 4, base.pad))
    assert torch.equal(known.predictions(taken)[1], known.predictions(taken)[1])
    assert float(known.predictions(taken)[1].abs().max()) <= 0.5
