"""Nothing is computed twice: what a conversion needs several times is kept."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bslora_convert import Recipe, compress
from bslora_convert.behaviour import evaluator
from bslora_convert.coding.forecast import Forecast
from bslora_convert.conversion import codes, fidelity
from bslora_convert.fit import source
from bslora_convert.lora import load_lora
from bslora_convert.verbs import compress as verb
from tests.behaviour.conftest import BASE, LORA, PROMPTS


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], Counter[str]]:
    calls: Counter[str] = Counter()

    def count(holder: Any, name: str) -> Counter[str]:
        original = getattr(holder, name)

        def called(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return original(*args, **options)

        monkeypatch.setattr(holder, name, called)
        return calls

    return count


def test_each_delta_is_decomposed_once(tmp_path: Path, counted: Callable[[Any, str], Counter[str]]) -> None:
    calls = counted(source, "product_svd")
    counted(Forecast, "bits_for")
    counted(verb, "load_lora")
    counted(verb, "sha256")
    compress(LORA, tmp_path / "out", Recipe(transform="none", max_error=0.15), report_html=False)
    assert calls["product_svd"] == len(load_lora(LORA).modules)
    assert calls["bits_for"] == calls["load_lora"] == calls["sha256"] == 1


def test_each_attempt_is_measured_once(tmp_path: Path, counted: Callable[[Any, str], Counter[str]]) -> None:
    calls = counted(codes, "code_form")
    counted(fidelity, "compare")
    compress(LORA, tmp_path / "out", Recipe(transform="none", max_error=0.15), report_html=False)
    assert calls["compare"] == calls["code_form"] + 1  # and what was written


@pytest.mark.slow
def test_calibration_rows_are_run_once_for_all_sizes(
    tmp_path: Path, counted: Callable[[Any, str], Counter[str]]
) -> None:
    calls = counted(evaluator, "collect")
    counted(verb, "load_lora")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[:24]))
    recipe = Recipe(transform="none", min_retention=0.9, base_model=str(BASE), prompts=str(rows))
    record = compress(LORA, tmp_path / "out", recipe, report_html=False)
    assert len(record["aim"]["path"]) > 1
    assert calls["collect"] == calls["load_lora"] == 1
