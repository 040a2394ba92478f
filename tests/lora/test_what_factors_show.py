"""Trainings and savings that went wrong, as far as the factors show it: told, and nothing else is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bslora_convert import Recipe, compress, expand
from bslora_convert.lora import load_lora
from bslora_convert.modules.factors import Factors
from tests.planting import random_products, write_lora

Change = Callable[[Factors], Factors]


def said(place: Path, change: Change, layers: int = 2, **options: object) -> list[str]:
    """The notes of an adapter whose factors were all changed so."""
    products = {name: change(product.held) for name, product in random_products(layers=layers).items()}
    return list(load_lora(write_lora(place, products, **options)).notes)  # type: ignore[arg-type]


def first_rows(f: Factors) -> Factors:
    b = f.b.clone()
    b[len(b) // 8 :] = 0
    return Factors(b, f.a)


def first_columns(f: Factors) -> Factors:
    a = f.a.clone()
    a[:, a.shape[1] // 4 :] = 0
    return Factors(f.b, a)


def first_of_a(f: Factors) -> Factors:
    a = f.a.clone()
    a[2:] = 0
    return Factors(f.b, a)


def repeated(f: Factors) -> Factors:
    return Factors(f.b, f.a[:4].repeat(2, 1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (first_rows, "14 of 14 modules 88% of the rows of B are exactly zero"),
        (first_columns, "75% of the columns of A are exactly zero"),
        (first_of_a, "75% of the rows of A are exactly zero although their columns of B are not"),
        (repeated, "50% of the rows of A repeat another row"),
        (lambda f: Factors(f.b * 0, f.a), "every B is zero"),
        (lambda f: Factors(f.b, f.a * 0), "every A is zero"),
    ],
)
def test_what_many_modules_show_is_told(tmp_path: Path, change: Change, words: str) -> None:
    (note,) = said(tmp_path / "lora", change)
    assert note.startswith("ATTENTION: ") and words in note


def test_a_scaling_of_zero_is_no_lack_of_training(tmp_path: Path) -> None:
    (note,) = said(tmp_path / "lora", lambda f: f, alpha=0)
    assert "lora_alpha is 0" in note
    record = compress(tmp_path / "lora", tmp_path / "out")
    assert "never trained" not in (tmp_path / "out" / "report.html").read_text()
    assert record.weight.energy == 0


def test_one_module_of_many_and_ranks_filled_up_are_nothing(tmp_path: Path) -> None:
    products = {name: product.held for name, product in random_products(layers=2).items()}
    name = next(iter(products))
    lora = write_lora(tmp_path / "one", {**products, name: first_rows(products[name])})
    assert load_lora(lora).notes == ()
    compress(lora, tmp_path / "compact", Recipe(transform="none", budget=0.5), report_html=False)
    expand(tmp_path / "compact", tmp_path / "filled", rank="uniform")
    assert load_lora(tmp_path / "filled").notes == ()


def test_a_head_of_zeros_is_told(tmp_path: Path) -> None:
    head = {"base_model.model.score.weight": torch.zeros(2, 64)}
    (note,) = said(tmp_path / "lora", lambda f: f, extra=head, modules_to_save=["score"])
    assert "score.weight of the saved modules is zero everywhere" in note
