"""`compare` of an adapter whose A's random initialisation is found."""

from pathlib import Path

import pytest

from bslora_convert import Recipe, compare, compress
from bslora_convert.baselines.initialised import INITIAL
from bslora_convert.errors import RecipeError
from tests.comparison.test_compare import TINY, row_of
from tests.planting import drawn_lora


def test_a_found_initialisation_is_used_by_codes_and_by_forms_named_so(tmp_path: Path) -> None:
    lora = drawn_lora(TINY / "gsm8k", tmp_path / "lora", seed=42)
    forms = ["svd_mixed", "svd_mixed_unbiased", "svd_nf4", "svd_nf4_initial", "svd_nf4_initial_unbiased", "nf4_initial"]
    by_init = {init: compare(lora, budgets=[0.125], forms=forms, init=init) for init in ("auto", "none", "42")}
    used = "against A's initialisation, seed 42"
    for form in forms:
        known, plain, asked = (row_of(by_init[init], form) for init in ("auto", "none", "42"))
        assert known["relative_error"] == asked["relative_error"]
        if form == "svd_nf4":
            assert known["relative_error"] == plain["relative_error"] and known["note"] == plain["note"] == ""
        elif INITIAL in form:
            assert used in known["note"]
            assert (
                plain["relative_error"] is plain["bytes"] is None
                and "initialisation, which is not known" in plain["note"]
            )
        else:
            assert known["note"] == used and plain["note"] == ""
            assert known["relative_error"] < 0.7 * plain["relative_error"]
    rows = {form: row_of(by_init["auto"], form) for form in forms}
    assert rows["svd_nf4_initial"]["relative_error"] < 0.9 * rows["svd_nf4"]["relative_error"]
    assert rows["svd_nf4_initial"]["bytes"] == rows["svd_nf4_initial_unbiased"]["bytes"]
    assert rows["svd_nf4_initial_unbiased"]["gain"] == pytest.approx(1, abs=0.01)
    assert rows["svd_mixed"]["relative_error"] < rows["svd_nf4_initial"]["relative_error"]
    written = compress(lora, tmp_path / "out", Recipe(transform="none", bytes=0.125), report_html=False)
    assert written.weight.relative_error == pytest.approx(rows["svd_mixed_unbiased"]["relative_error"], rel=0.1)


def test_an_initialisation_that_is_asked_for_wrongly_is_refused(tmp_path: Path) -> None:
    lora = drawn_lora(TINY / "gsm8k", tmp_path / "lora", seed=42)
    for init, forms, words in (
        ("somewhere", ["svd_mixed"], "init is 'somewhere': auto, none, search, a seed"),
        (-1, ["svd_mixed"], "init is -1"), (43, ["svd_mixed"], "init is 43: no A of"),
        (42, ["svd_nf4", "svd_adaptive"], "init is 42: none of these forms"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            compare(lora, budgets=[0.125], forms=forms, init=init)
