"""`compare` as a user meets it: the form that an adapter was made in wins at its own size, and what is saved is what was said."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bslora_convert import compare, load_lora, verify
from bslora_convert.baselines import BASELINES, QUANTISED, WHOLE
from bslora_convert.baselines.initialised import INITIAL
from bslora_convert.bslora.transforms import Kronecker, Slice
from bslora_convert.cli import main
from bslora_convert.comparison.forms import CODED, FORMS, IN_CODES, OWN_SIZE, SUFFIX, UNBIASED, USUAL, WITHIN_BUDGET
from bslora_convert.comparison.winners import winners
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.fit.gain import LARGEST
from bslora_convert.report.advice import CALLS
from bslora_convert.report.advice import compress as calls_for
from bslora_convert.results.analysis import Comparison, FormRow
from bslora_convert.verbs.compare import handfuls
from tests.baselines.planted import PLANTED
from tests.conftest import FIXTURES
from tests.planting import KINDS, deltas_of, plant, write_lora
from tests.records import blank

TINY = FIXTURES / "tiny"
CHEAP = (
    "svd_uniform",
    "svd_adaptive",
    "sharelora_a",
    "sharelora_ab",
    "bslora_ke",
    "bslora_ke_paper",
    "bslora_ss_inter",
)


TWICE = {kind: (2 * out, 2 * width) for kind, (out, width) in KINDS.items()}


def row_of(record: dict[str, Any], form: str) -> dict[str, Any]:
    return next(row for row in record["rows"] if row["form"] == form)


def test_every_form_of_the_contract_is_there() -> None:
    assert {
        "svd_uniform", "svd_adaptive", "bslora_ss", "bslora_gt", "bslora_ke", "sharelora_a", "sharelora_b", "sharelora_ab",
        "tied_lora_tl5", "tied_lora_tl6", "vera", "vb_lora", "prolora",
    } <= set(WITHIN_BUDGET)  # fmt: skip
    assert set(FORMS) == set(WITHIN_BUDGET) | set(IN_CODES) | set(OWN_SIZE) | set(UNBIASED)
    assert {name.removesuffix(SUFFIX) for name in UNBIASED} < set(FORMS)
    assert set(FORMS) - set(USUAL) == {name for name in FORMS if name.removesuffix(SUFFIX).endswith(INITIAL)}
    assert {name.removesuffix(INITIAL) for name in set(FORMS) - set(USUAL) - set(UNBIASED)} == {*QUANTISED, *WHOLE}


def test_rows_are_honest_about_size_and_files_are_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "compare", TINY / "gsm8k", "--budgets", "0.5,0.1", "--forms", ",".join(CHEAP), "--out", out, "--save", "--json",
    ]  # fmt: skip
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr
    record = json.loads(done.stdout)
    assert record == json.loads((out / "comparison.json").read_text())
    keys = {
        "form",
        "budget",
        "parameters",
        "parameter_ratio",
        "bytes",
        "relative_error",
        "seconds",
        "note",
        "functional",
    }
    for row in record["rows"]:
        assert keys <= set(row)
        if row["relative_error"] is None:
            assert "needs" in row["note"] or "budget" in row["note"]
        elif row["form"] in WITHIN_BUDGET:
            assert row["parameter_ratio"] <= row["budget"]
    assert {path.name for path in out.iterdir() if path.is_file()} == {
        "comparison.json", "comparison.html", "error_by_size.svg", "error_by_size.png"
    }  # fmt: skip
    best = winners(Comparison.from_dict(record))
    assert set(best) == {0.5, 0.1}
    original = load_lora(TINY / "gsm8k")
    saved = load_lora(out / "svd_adaptive-0.5")
    lost = energy = 0.0
    for name, module in original.modules.items():
        mine, theirs = module.factors(), saved.modules[name].factors()
        target = mine.b.double() @ mine.a.double()
        lost += float((target - theirs.b.double() @ theirs.a.double()).square().sum())
        energy += float(target.square().sum())
    assert (lost / energy) ** 0.5 == pytest.approx(row_of(record, "svd_adaptive")["relative_error"], rel=1e-3)


@pytest.mark.parametrize("form", ["svd_adaptive", "svd_mixed", "bslora_ss"])
def test_unbiased_forms_are_the_same_at_the_strength_of_the_original(form: str, tmp_path: Path) -> None:
    forms = [form, f"{form}{SUFFIX}"]
    record = compare(TINY / "gsm8k", tmp_path / "out", budgets=[0.25], forms=forms, save=True)
    plain, scaled = (row_of(record, name) for name in forms)
    assert plain["bytes"] == scaled["bytes"]
    assert plain["relative_error"] < scaled["relative_error"]
    original, saved = load_lora(TINY / "gsm8k"), load_lora(tmp_path / "out" / f"{form}{SUFFIX}-0.25")
    for name, module in original.modules.items():
        target, kept = (f.b.double() @ f.a.double() for f in (module.factors(), saved.modules[name].factors()))
        gain = float((target * kept).sum() / target.square().sum())
        assert gain == pytest.approx(1, abs=0.01) or gain < 1 / LARGEST + 0.8


@pytest.mark.parametrize("form", ["svd_adaptive", "svd_int8", "svd_int4", "svd_mixed"])
def test_forms_without_some_modules_are_saved_as_adapters_that_load(form: str, tmp_path: Path) -> None:
    record = compare(TINY / "gsm8k", tmp_path / "out", budgets=[0.04], forms=[form], save=True)
    saved = load_lora(tmp_path / "out" / f"{form}-0.04")
    lost = energy = 0.0
    for name, module in load_lora(TINY / "gsm8k").modules.items():
        target, kept = (
            factors.b.double() @ factors.a.double() for factors in (module.factors(), saved.modules[name].factors())
        )
        lost += float((target - kept).square().sum())
        energy += float(target.square().sum())
    assert any(not module.b.any() for module in saved.modules.values())
    assert (lost / energy) ** 0.5 == pytest.approx(row_of(record, form)["relative_error"], rel=1e-2)


@pytest.mark.parametrize(
    ("form", "planted"),
    [
        pytest.param("bslora_ke", plant(Kronecker(64), (1, 4, 8), layers=4, kinds=TWICE), marks=pytest.mark.slow),
        pytest.param("bslora_ss", plant(Slice.covering(KINDS.values()), (1, 2, 4), layers=3), marks=pytest.mark.slow),
        ("bslora_ke_inter", plant(Kronecker(32), (0, 0, 8), layers=3)),
        pytest.param("bslora_ke_intra", plant(Kronecker(32), (0, 8, 0), layers=3), marks=pytest.mark.slow),
    ],
)
def test_the_form_that_an_adapter_was_made_in_wins_at_its_own_size(tmp_path: Path, form: str, planted: Any) -> None:
    lora = write_lora(tmp_path / "lora", deltas_of(planted))
    whole = load_lora(lora).parameters
    budget = planted.parameters / whole
    forms = [name for name in WITHIN_BUDGET if name not in ("vera", "vb_lora")]
    record = compare(lora, budgets=[budget], forms=forms)
    assert winners(record)[budget] == form
    assert row_of(record, form)["relative_error"] < 1e-3


# Whatever is of one form is of these too, at no more numbers. One rank for all gives each module at most the rank that it has.
HOLDS = {
    "svd_uniform": {"svd_adaptive"},
    "svd_adaptive": {"svd_uniform"},
    "sharelora_ab": {"tied_lora_tl5"},
    "tied_lora_tl5": {"sharelora_ab"},
}


@pytest.mark.parametrize("form", PLANTED)
def test_so_does_every_other_form(tmp_path: Path, form: str) -> None:
    modules, parameters = PLANTED[form]()
    lora = write_lora(tmp_path / "lora", modules)
    # The two that are slow to fit stand beside one form of each sort.
    slow = set() if form in ("svd_adaptive", "sharelora_a", "vb_lora") else {"vb_lora", "bslora_ke"}
    forms = [name for name in (*BASELINES, "bslora_ke", "bslora_gt") if name not in slow]
    record = compare(lora, budgets=[parameters / load_lora(lora).parameters], forms=forms)
    own = row_of(record, form)["relative_error"]
    assert own < 1e-3
    others = {
        row["form"]: row["relative_error"]
        for row in record["rows"]
        if row["form"] not in {form} | HOLDS.get(form, set())
    }
    assert all(error is None or error > 10 * own for error in others.values()), others


def test_mixed_widths_lose_least_at_as_many_bytes() -> None:
    record = compare(TINY / "gsm8k", budgets=[0.5, 0.25, 0.125], forms=["svd_uniform", "svd_adaptive", *CODED])
    for budget in (0.5, 0.25, 0.125):
        rows = {row["form"]: row for row in record["rows"] if row["budget"] == budget}
        assert all(row["byte_ratio"] <= budget for row in rows.values() if row["bytes"] is not None)
        errors = {form: row["relative_error"] for form, row in rows.items() if row["relative_error"] is not None}
        assert min(errors, key=lambda form: errors[form]) == "svd_mixed"


def test_behaviour_is_what_verify_measures(tmp_path: Path) -> None:
    prompts = TINY / "gsm8k-heldout.jsonl"
    record = compare(
        TINY / "gsm8k", tmp_path / "out", budgets=[0.25], forms=["svd_uniform", "sharelora_b"], base_model=str(TINY / "base"),
        prompts=prompts, limit=6, save=True, dtype="float32",
    )  # fmt: skip
    for row in record["rows"]:
        found = verify(
            tmp_path / "out" / f"{row['form']}-0.25",
            TINY / "gsm8k",
            TINY / "base",
            prompts=prompts,
            limit=6,
            max_new_tokens=0,
        )
        for measure in ("kl", "base_kl", "retention", "agreement"):
            assert row["functional"][measure] == pytest.approx(found[measure], rel=1e-3, abs=1e-6)
    assert (tmp_path / "out" / "kl_by_size.png").is_file()


def test_forms_take_turns_where_memory_is_short() -> None:
    assert handfuls({"a": 3, "b": 4, "c": 5, "d": 20, "e": 1}, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert handfuls({}, 8) == []


def test_vera_and_vb_lora_load_in_peft(tmp_path: Path) -> None:
    record = compare(
        TINY / "gsm8k", tmp_path / "out", budgets=[0.2], forms=["vera", "vb_lora"], save=True, dtype="float32"
    )
    base = AutoModelForCausalLM.from_pretrained(TINY / "base")
    ids = torch.arange(5, 25)[None]
    plain = base(input_ids=ids).logits
    for row in record["rows"]:
        assert row["relative_error"] is not None, row["note"]
        fresh = AutoModelForCausalLM.from_pretrained(TINY / "base")
        model = PeftModel.from_pretrained(fresh, str(tmp_path / "out" / f"{row['form']}-0.2"))
        assert not torch.allclose(model(input_ids=ids).logits, plain)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"budgets": [0.0]}, "budgets holds 0.0"), ({"budgets": []}, "budgets is empty"), ({"forms": ["lora"]}, "lora unknown"),
        ({"prompts": "x"}, "given together"), ({"dtype": "int8"}, "dtype is 'int8'"), ({"save": True}, "save needs"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            compare(TINY / "gsm8k", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no such file"):
        compare(tmp_path / "none")
    done = CliRunner().invoke(main, ["compare", str(TINY / "gsm8k"), "--budgets", "a,b"])
    assert done.exit_code == 2


@pytest.mark.parametrize("form", [*CALLS])
def test_the_call_that_is_printed_makes_the_form(form: str, tmp_path: Path) -> None:
    record = compare(TINY / "gsm8k", budgets=[0.25], forms=[form])
    advice = calls_for(record)[0.25]
    assert advice.form == form
    words = [str(tmp_path / "out") if word == "OUT_DIR" else word for word in shlex.split(advice.call)[1:]]
    done = CliRunner().invoke(main, [*words, "--no-report-html", "--json"])
    assert done.exit_code in (0, 1), done.stderr  # 1: smaller than nothing gained
    weight = json.loads((tmp_path / "out" / "fidelity.json").read_text())["weight"]
    row = row_of(record, form)
    assert weight["relative_error"] == pytest.approx(row["relative_error"], rel=0.15)  # of the file's bytes
    assert weight["gain"] == pytest.approx(row["gain"], abs=0.02)


def test_what_is_printed_is_the_best_that_compress_makes() -> None:
    def row(form: str, budget: float, error: float, kl: float | None = None) -> FormRow:
        return blank(FormRow, form=form, budget=budget, relative_error=error, functional=kl and {"kl": kl})

    plain = [row("svd_mixed", 0.5, 0.10), row("svd_adaptive", 0.5, 0.30), row("svd_nf4_unbiased", 0.5, 0.01)]
    scaled = [row("svd_mixed_unbiased", 0.5, 0.11), row("svd_int4_unbiased", 0.5, 0.12)]
    measured = [
        row("svd_mixed", 0.25, 0.2, 0.004), row("svd_mixed_unbiased", 0.25, 0.22, 0.003),
        row("svd_int4_unbiased", 0.25, 0.3, 0.002), row("svd_int4", 0.25, 0.25, 0.005), row("loraquant", 0.25, 0.1, 0.001),
    ]  # fmt: skip
    for rows, form, reason in (
        (plain, "svd_mixed", "lowest error that"),
        (plain + scaled, "svd_mixed_unbiased", "of unbiased forms"),
        (measured, "svd_int4_unbiased", "lowest KL"),
        (measured[:1] + measured[3:4], "svd_mixed", "lowest KL"),
    ):
        (advice,) = calls_for(blank(Comparison, source={"path": "lora"}, rows=rows)).values()
        assert advice.form == form
        assert reason in advice.reason
        assert ("--gain least-squares" in advice.call) == (not form.endswith(SUFFIX))


def test_whole_adapters_in_codes_stand_at_their_own_size() -> None:
    record = compare(TINY / "gsm8k", budgets=[0.5, 0.25], forms=["nf4", "nf4_unbiased", "svd_nf4"])
    whole, scaled = (row_of(record, name) for name in ("nf4", "nf4_unbiased"))
    assert [row["form"] for row in record["rows"]].count("nf4") == 1
    assert whole["budget"] == whole["byte_ratio"] == scaled["byte_ratio"]
    assert 0.25 < whole["byte_ratio"] < 0.27
    assert whole["parameter_ratio"] == 1
    assert scaled["gain"] == pytest.approx(1, abs=1e-3)
    assert whole["gain"] < scaled["gain"]
