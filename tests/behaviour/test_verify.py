"""`verify` on a real model: against dense computation, against itself, and against what doesn't belong together."""

import copy
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from bslora_convert import Recipe, compress, expand, load_compact, verify
from bslora_convert.behaviour.adapter import read_adapter
from bslora_convert.behaviour.generation import rouge_l
from bslora_convert.behaviour.intervals import paired_interval
from bslora_convert.behaviour.model import load_base
from bslora_convert.behaviour.prompts import encode, read_prompts
from bslora_convert.behaviour.saving import Saving
from bslora_convert.cli import main
from bslora_convert.errors import InputError, OutputError, RecipeError, Unsaved
from bslora_convert.files.record import foreign
from bslora_convert.lora import load_lora
from bslora_convert.recipe.verifying import VerifyOptions
from bslora_convert.results.behaviour import TaskRecord
from tests.conftest import FIXTURES
from tests.planting import random_products, write_lora

TINY = FIXTURES / "tiny"
BASE, LORA, PROMPTS = TINY / "base", TINY / "gsm8k", TINY / "gsm8k-heldout.jsonl"
CONTRACT = {
    "schema_version", "base_model", "prompts", "kl", "kl_p99", "agreement", "nll", "base_kl", "retention", "hidden_error",
    "generation", "tasks", "thresholds", "passed",
}  # fmt: skip


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "compact"
    compress(LORA, out, Recipe(transform="ke", budget=0.5, shared_size=32))
    return out


@pytest.fixture
def compact(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "compact"))


def merged(model: Any, deltas: dict[str, torch.Tensor]) -> Any:
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, delta in deltas.items():
            model.get_submodule(name).weight += delta
    return model


@torch.no_grad()
def test_every_measure_is_what_a_dense_computation_says(compact: Path) -> None:
    record = verify(compact, LORA, BASE, prompts=PROMPTS, limit=12, batch_size=5, max_new_tokens=0)
    base = load_base(BASE)
    reference = merged(
        base.model, {n: m.b.double() @ m.a.double() * m.scaling for n, m in load_lora(LORA).modules.items()}
    )
    form = load_compact(compact).form
    small = merged(base.model, {n: form.delta(n).b.double() @ form.delta(n).a.double() for n in form.modules})
    plain = merged(base.model, {})
    kl: list[torch.Tensor] = []
    base_kl, agreed, nll, lost, effect = 0.0, 0, dict.fromkeys(("base", "reference", "compact"), 0.0), 0.0, 0.0
    for row in read_prompts(PROMPTS, 12):
        example = encode(row, base.tokenizer, base.context, True)
        ids, start = torch.tensor([example.ids]), example.start
        outputs = {
            name: model(input_ids=ids, output_hidden_states=True)
            for name, model in (("base", plain), ("reference", reference), ("compact", small))
        }
        logs = {name: output.logits[0, start - 1 : -1].log_softmax(-1) for name, output in outputs.items()}
        hidden = {name: output.hidden_states[-1][0, start - 1 : -1] for name, output in outputs.items()}
        p = logs["reference"].exp()
        kl.append((p * (logs["reference"] - logs["compact"])).sum(-1))
        base_kl += float((p * (logs["reference"] - logs["base"])).sum())
        agreed += int((p.argmax(-1) == logs["compact"].argmax(-1)).sum())
        for name in nll:
            nll[name] -= float(logs[name].gather(1, ids[0, start:, None]).sum())
        lost += float((hidden["compact"] - hidden["reference"]).square().sum())
        effect += float((hidden["reference"] - hidden["base"]).square().sum())
    values = torch.cat(kl).numpy()
    n = len(values)
    assert record["prompts"]["tokens"] == n
    expected = {
        "kl": values.mean(), "kl_p99": np.quantile(values, 0.99), "base_kl": base_kl / n, "agreement": agreed / n,
        "retention": 1 - values.mean() / (base_kl / n), "hidden_error": (lost / effect) ** 0.5,
    }  # fmt: skip
    for key, value in expected.items():
        assert record[key] == pytest.approx(float(value), rel=1e-4, abs=1e-6), key
    for name, value in nll.items():
        assert record["nll"][name] == pytest.approx(value / n, rel=1e-5)


def test_intervals_are_kept_printed_and_on_the_page(compact: Path) -> None:
    record = verify(compact, LORA, BASE, prompts=PROMPTS, limit=24, max_new_tokens=0, save=True)
    for name in ("kl", "retention", "agreement"):
        low, high = record[f"{name}_ci95"]
        assert low < record[name] < high, name
    again = verify(compact, LORA, BASE, prompts=PROMPTS, limit=24, batch_size=3, max_new_tokens=0)
    assert again["kl_ci95"] == pytest.approx(record["kl_ci95"], rel=1e-4)
    words = f"effect kept {record['retention_ci95'][0]:.2%} to {record['retention_ci95'][1]:.2%}"
    page = (compact / "report.html").read_text()
    assert words in page
    assert "too few" not in page
    said = ["verify", str(compact), "--reference", str(LORA), "--base-model", str(BASE), "--prompts", str(PROMPTS)]
    shown = CliRunner().invoke(main, [*said, "--limit", "3", "--max-new-tokens", "0"])
    assert "95 % intervals over 3 rows (too few rows): KL" in shown.stdout
    assert "3 rows are too few" in shown.stderr


def test_an_adapter_against_itself_and_against_its_expansion(compact: Path, tmp_path: Path) -> None:
    same = verify(LORA, LORA, BASE, prompts=PROMPTS, limit=8, max_new_tokens=8)
    assert same["kl"] < 1e-6
    assert (same["agreement"], same["retention"], same["hidden_error"]) == (1.0, 1.0, 0.0)
    assert same["generation"] == {"rows": 8, "exact_match": 1.0, "rouge_l": 1.0}
    expand(compact, tmp_path / "lora", dtype="float32")
    other = verify(compact, tmp_path / "lora", BASE, prompts=PROMPTS, limit=8, max_new_tokens=0, any_reference=True)
    assert other["kl"] < 1e-6
    assert other["agreement"] == 1.0
    assert other["retention"] > 0.99999


def test_the_result_does_not_depend_on_the_batches(compact: Path) -> None:
    first, second = (
        verify(compact, LORA, BASE, prompts=PROMPTS, limit=9, batch_size=size, max_new_tokens=0) for size in (1, 9)
    )
    for key in ("kl", "kl_p99", "base_kl", "hidden_error"):
        assert first[key] == pytest.approx(second[key], rel=1e-4)
    assert [row["line"] for row in first["worst"]] == [row["line"] for row in second["worst"]]


def quick(compact: Path, reference: Path | None = LORA, **options: Any) -> dict[str, Any]:
    return verify(compact, reference, BASE, **{"prompts": PROMPTS, "limit": 4, "max_new_tokens": 0, **options})


def test_the_result_is_kept_where_the_contract_says(compact: Path, tmp_path: Path) -> None:
    before = json.loads((compact / "fidelity.json").read_text())
    page = (compact / "report.html").read_text()
    assert "How it behaves" not in page
    record = quick(compact)
    assert not (compact / "verify.json").exists()
    assert json.loads((compact / "fidelity.json").read_text()) == before
    for _ in range(2):  # as many rows again replace what was found first
        record = quick(compact, save=True, max_new_tokens=6)
    assert set(record) >= CONTRACT
    assert json.loads((compact / "verify.json").read_text()) == record
    after = json.loads((compact / "fidelity.json").read_text())
    assert {**after, "files": None} == {**before, "functional": record, "files": None}
    assert foreign(compact) == []  # the record speaks of what was added
    shown = (compact / "report.html").read_text()
    assert shown.count("How it behaves") == 1
    assert "Behaviour has not been measured" in page
    assert "Behaviour has not been measured" not in shown
    first, second = (re.sub("(?s)<!-- functional -->.*<!-- /functional -->", "", text) for text in (page, shown))
    assert first == second  # nothing else of the page has changed
    assert f"{record['retention']:.2%}" in shown
    # A plain LoRA's directory is left as it is; with --out the result goes there.
    files = sorted(path.name for path in LORA.iterdir())
    verify(LORA, LORA, BASE, prompts=PROMPTS, limit=2, max_new_tokens=0, out=tmp_path / "elsewhere.json")
    assert sorted(path.name for path in LORA.iterdir()) == files
    assert json.loads((tmp_path / "elsewhere.json").read_text())["kl"] < 1e-6


def test_reference_and_base_are_those_of_the_record(
    compact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(FIXTURES.parent)
    record = verify(compact, prompts=PROMPTS, limit=2, max_new_tokens=0)
    assert (record["reference"]["path"], record["base_model"]) == (str(LORA), "fixtures/tiny/base")
    (compact / "fidelity.json").unlink()
    with pytest.raises(InputError, match="no record says what it was made from"):
        verify(compact, prompts=PROMPTS, limit=2)
    record = quick(compact, limit=2)
    assert any("nobody knows how they were measured" in note for note in record["notes"])


def test_another_reference_is_asked_for_and_never_saved(compact: Path, tmp_path: Path) -> None:
    products = {n: m.factors() for n, m in load_lora(LORA).modules.items()}
    other = write_lora(tmp_path / "other", products, base_model_name_or_path="fixtures/tiny/base")
    with pytest.raises(InputError, match="--any-reference"):
        quick(compact, other)
    with pytest.raises(RecipeError, match="another reference"):
        quick(compact, other, any_reference=True, save=True)
    noted = quick(compact, other, any_reference=True, limit=2)
    assert any("is not what the adapter was made from" in note for note in noted["notes"])


def test_less_never_replaces_more(compact: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    for where in ({"save": True}, {"out": out}):
        quick(compact, **where)
        kept = (compact / "verify.json" if "save" in where else out).read_bytes()
        with pytest.raises(OutputError, match="measurement on 4 prompts, and this one has 1"):
            quick(compact, limit=1, **where)
        assert (compact / "verify.json" if "save" in where else out).read_bytes() == kept
        assert quick(compact, limit=1, overwrite=True, **where)["prompts"]["rows"] == 1
        assert quick(compact, limit=3, **where)["prompts"]["rows"] == 3
    mine = tmp_path / "mine.json"
    mine.write_text('{"thesis": 1}')
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="no result of verify"):
            quick(compact, out=mine, overwrite=overwrite)
    for options, words in (
        ({"out": compact / "verify.json"}, "--save"), ({"out": out, "save": True}, "exclude"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            quick(compact, **options)
    with pytest.raises(OutputError, match="can't be written to"):
        quick(compact, out=tmp_path / "nowhere" / "out.json")


def test_prompts_and_tasks_stand_side_by_side(compact: Path) -> None:
    adapters = read_adapter(compact), read_adapter(LORA)
    on_prompts = quick(compact, save=True)
    task = TaskRecord(metric="acc", items=8, base=0.1, reference=0.5, compact=0.5, difference_ci95=[0.0, 0.0])
    nothing: dict[str, Any] = dict.fromkeys(("prompts", "kl", "agreement", "retention", "base_kl"))

    def keep(tasks: dict[str, TaskRecord], **options: Any) -> None:
        asked = VerifyOptions(save=True, tasks=tuple(tasks), **options)
        saving = Saving.plan(adapters[0], asked, another_reference=False)
        assert saving is not None
        saving.check(adapters[1], str(BASE), None, asked)
        saving.keep(replace(on_prompts, **nothing, tasks=tasks), lambda page, _: page)

    keep({"arc": task})
    kept = json.loads((compact / "verify.json").read_text())
    assert kept == {**on_prompts.to_dict(), "tasks": {"arc": task.to_dict()}}
    quick(compact, save=True)  # prompts again leave the task
    keep({"boolq": task})
    assert set(json.loads((compact / "verify.json").read_text())["tasks"]) == {"arc", "boolq"}
    with pytest.raises(OutputError, match="arc measured on 8 items, and this time there are 3"):
        keep({"arc": task}, limit=3)
    with pytest.raises(Unsaved, match="this time there are 2") as found:
        keep({"arc": replace(task, items=2)})
    assert found.value.record["tasks"]["arc"]["items"] == 2


def test_what_was_measured_is_printed_where_it_can_not_be_kept(compact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OutputError("no space left")

    monkeypatch.setattr("bslora_convert.behaviour.saving.replace_file", full)
    words = ["verify", str(compact), "--reference", str(LORA), "--base-model", str(BASE), "--prompts", str(PROMPTS)]
    done = CliRunner().invoke(main, [*words, "--limit", "2", "--max-new-tokens", "0", "--save", "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["kl"] > 0
    assert "measured, but not kept" in done.stderr


def test_worst_prompts_can_be_read_side_by_side(compact: Path) -> None:
    record = verify(compact, LORA, BASE, prompts=PROMPTS, limit=20, max_new_tokens=5)
    divergences = [row["kl"] for row in record["worst"]]
    assert len(divergences) == 6
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[0] > record["kl"]
    for row in record["worst"]:
        assert row["prompt"].startswith("Question:")
        assert isinstance(row["reference"], str)
        assert isinstance(row["compact"], str)
    assert record["generation"]["rows"] == 12


def test_rows_without_a_completion_are_completed_by_the_reference(compact: Path, tmp_path: Path) -> None:
    prompts = [{"prompt": json.loads(line)["prompt"]} for line in PROMPTS.read_text().splitlines()[:3]]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in prompts))
    record = verify(compact, LORA, BASE, prompts=path, max_new_tokens=7)
    assert record["prompts"]["completions_written"] == 3
    assert 0 < record["prompts"]["tokens"] <= 3 * 9
    assert any("the reference wrote it" in note for note in record["notes"])


def test_long_rows_are_cut_counted_and_reported(compact: Path) -> None:
    record = verify(compact, LORA, BASE, prompts=PROMPTS, limit=5, max_new_tokens=0, max_length=24)
    assert record["prompts"]["cut"] == 5
    assert any("5 of 5 rows of" in note and "cut to 24 tokens" in note for note in record["notes"])


def test_saved_heads_and_tables_run_too(tmp_path: Path) -> None:
    """A carried weight is in place only while its adapter is active."""
    source = load_lora(LORA)
    head = torch.randn(1024, 128) / 10
    products = {name: module.factors() for name, module in source.modules.items()}
    write_lora(
        tmp_path / "lora", products, extra={"base_model.model.lm_head.weight": head}, modules_to_save=["lm_head"],
        base_model_name_or_path=str(BASE),
    )  # fmt: skip
    compress(tmp_path / "lora", tmp_path / "compact", Recipe(transform="none", budget=1.0), report_html=False)
    record = verify(tmp_path / "compact", tmp_path / "lora", BASE, prompts=PROMPTS, limit=3, max_new_tokens=0)
    assert record["kl"] < 1e-5
    assert record["base_kl"] > 0.1
    bare = write_lora(tmp_path / "bare", products, base_model_name_or_path=str(BASE))
    assert verify(bare, tmp_path / "lora", BASE, prompts=PROMPTS, limit=3, max_new_tokens=0)["kl"] > 0.1


# ---------------------------------------------------------------------------------------------- what doesn't belong together


def refused(words: str, kind: type[Exception] = InputError, **changes: Any) -> None:
    options: dict[str, Any] = {"compact": LORA, "reference": LORA, "base_model": BASE, "prompts": PROMPTS} | changes
    with pytest.raises(kind, match=words):
        verify(**options)


def test_wrong_pairs_are_refused(tmp_path: Path) -> None:
    products = {n: m.factors() for n, m in load_lora(LORA).modules.items()}
    other = write_lora(tmp_path / "other", products, base_model_name_or_path="another/model")
    refused("was made for fixtures/tiny/base, .* for another/model", compact=LORA, reference=other)
    narrow = write_lora(tmp_path / "narrow", random_products(layers=2), base_model_name_or_path="fixtures/tiny/base")
    refused("128 x 256 in the base model, 64 x 128 in the adapter", compact=narrow, reference=narrow)
    deep = write_lora(tmp_path / "deep", {n.replace("layers.1", "layers.7"): p for n, p in products.items()},
                      base_model_name_or_path="fixtures/tiny/base")  # fmt: skip
    refused(r"the base model has no model\.layers\.7", reference=deep)
    refused("no such file", reference=tmp_path / "nowhere")
    refused("no such directory", base_model=tmp_path / "no-model")
    refused("no config.json", base_model=tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    refused("holds no prompts", prompts=tmp_path / "empty.jsonl")
    (tmp_path / "blank.jsonl").write_text('{"prompt": " "}\n')
    refused("line 1: the row has no text", prompts=tmp_path / "blank.jsonl")
    refused("nothing to measure", RecipeError, prompts=None)
    refused("limit is 0", RecipeError, limit=0)
    refused("max_new_tokens is -1", RecipeError, max_new_tokens=-1)
    refused("dtype is 'int8'", RecipeError, dtype="int8")
    refused("max_accuracy_drop needs tasks", RecipeError, max_accuracy_drop=0.1, limit=2, max_new_tokens=0)
    carried = write_lora(tmp_path / "carried", products, extra={"base_model.model.score.weight": torch.ones(2, 2)},
                         base_model_name_or_path="fixtures/tiny/base")  # fmt: skip
    refused("it carries score.weight, which is no weight of the base model", compact=carried, limit=2)


def test_thresholds_are_a_gate(compact: Path) -> None:
    def run(*options: str) -> Any:
        words = ["verify", str(compact), "--reference", str(LORA), "--base-model", str(BASE), "--prompts", str(PROMPTS)]
        return CliRunner().invoke(main, [*words, "--limit", "3", "--max-new-tokens", "0", *options])

    for words in (("--max-kl", "nan"), ("--min-retention", "5"), ("--min-agreement", "inf")):
        assert run(*words).exit_code == 2
    good = run("--json", "--max-kl", "50", "--min-retention", "0.01")
    assert good.exit_code == 0, good.output
    record = json.loads(good.stdout)
    assert record["passed"] is True
    assert record["thresholds"]["max_kl"] == {"limit": 50.0, "value": record["kl"], "passed": True}
    bad = run("--json", "--max-kl", "1e-9", "--min-agreement", "0.01")
    assert bad.exit_code == 1
    assert json.loads(bad.stdout)["passed"] is False
    assert "--max-kl 1e-09 (measured" in bad.stderr
    assert not (compact / "verify.json").exists()
    shown = run("--save")
    assert shown.exit_code == 0
    assert "It keeps" in shown.stdout
    assert "verify.json" in shown.stdout.replace("\n", "")
    assert run("--limit", "0").exit_code == 2


# ---------------------------------------------------------------------------------------------- tasks and texts


@pytest.mark.slow
def test_tasks_run_offline_through_the_harness(compact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names = ["boolq", "piqa", "social_i_qa", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "gsm8k", "svamp"]
    record = verify(
        compact, LORA, BASE, tasks=[f"local_{name}" for name in names], task_data=FIXTURES / "tasks", limit=1,
        max_accuracy_drop=1.0,
    )  # fmt: skip
    assert record["kl"] is None
    assert record["passed"]
    for name in names:
        task = record["tasks"][f"local_{name}"]
        assert task["items"] == 1
        assert task["metric"] == ("exact_match" if name in ("gsm8k", "svamp") else "acc")
        low, high = task["difference_ci95"]
        assert -1 <= low <= task["compact"] - task["reference"] <= high <= 1
    assert "It keeps" not in (compact / "report.html").read_text()
    with pytest.raises(RecipeError, match="no_such_task unknown; shipped for local files: local_arc_challenge"):
        verify(compact, LORA, BASE, tasks=["no_such_task"])
    with pytest.raises(InputError, match="--task-data"):
        verify(compact, LORA, BASE, tasks=["local_boolq"])


def test_the_interval_of_a_paired_difference() -> None:
    generator = np.random.default_rng(3)
    first = generator.random(400) < 0.5
    assert paired_interval(first, first) == pytest.approx((-3 / 400, 3 / 400))  # none of 400 differs
    assert paired_interval(first[:4], first[:4]) == pytest.approx((-0.75, 0.75))
    assert paired_interval(np.ones(2), np.zeros(2)) == (0.0, 2.0)
    second = np.where(generator.random(400) < 0.9, first, ~first)  # pairs agree nine times of ten
    low, high = paired_interval(first, second)
    difference = first.astype(float) - second
    spread = difference.std() / 20
    assert low == pytest.approx(difference.mean() - 1.96 * spread, abs=0.006)
    assert high == pytest.approx(difference.mean() + 1.96 * spread, abs=0.006)
    assert paired_interval(first, second) == (low, high)


def test_rouge_l_by_hand() -> None:
    assert rouge_l("the cat sat on the mat", "the cat on a mat") == pytest.approx(2 * 4 / 11)
    assert rouge_l("", "") == 1.0
    assert rouge_l("a", "") == 0.0


@given(words=st.lists(st.sampled_from("abc"), max_size=8), others=st.lists(st.sampled_from("abc"), max_size=8))
def test_rouge_l_is_a_likeness(words: list[str], others: list[str]) -> None:
    first, second = " ".join(words), " ".join(others)
    assert rouge_l(first, second) == rouge_l(second, first)
    assert 0 <= rouge_l(first, second) <= 1
    assert rouge_l(first, first) == 1


# ---------------------------------------------------------------------------------------------- the real base model


@pytest.mark.slow
@pytest.mark.real_base
def test_the_real_adapter_on_its_base_model(smollm2: Path, real_adapter: Path, tmp_path: Path) -> None:
    same = verify(
        real_adapter, real_adapter, smollm2, prompts=FIXTURES / "word-problems.jsonl", limit=1, max_new_tokens=0
    )
    assert same["kl"] < 1e-6
    assert (same["agreement"], same["retention"]) == (1.0, 1.0)
    compress(
        real_adapter,
        tmp_path / "small",
        Recipe(transform="none", ranks=(2, 0, 0), local_ranks="uniform"),
        report_html=False,
    )
    record = verify(
        tmp_path / "small", real_adapter, smollm2, prompts=FIXTURES / "word-problems.jsonl", limit=12, max_new_tokens=4
    )
    assert 0.005 < record["kl"] < 0.03
    assert 0.4 < record["base_kl"] < 0.9
    assert record["retention"] > 0.95
    assert record["nll"]["reference"] < record["nll"]["compact"] < record["nll"]["base"]
