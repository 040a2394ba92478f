"""Small and odd adapters under every kind of target: each gives a result or says what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bslora_convert import Recipe, compress
from bslora_convert.errors import RecipeError, ThresholdMissed
from bslora_convert.modules.factors import Factors
from tests.planting import random_products, write_lora

TARGETS: tuple[dict[str, Any], ...] = (
    {},
    {"max_error": 0.3},
    {"max_error": 0.3, "bits": 4},
    {"bytes": 0.5},
    {"bytes": 0.5, "bits": 4},
    {"budget": 0.5},
    {"ranks": (1, 0, 0), "bits": 3},
)


def products(b: torch.Tensor, a: torch.Tensor, modules: int = 2) -> dict[str, Any]:
    like = random_products(layers=1)
    kind = type(next(iter(like.values())))
    return {f"model.layers.{i}.self_attn.q_proj": kind(Factors(b.clone(), a.clone())) for i in range(modules)}


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("kind", ["zero", "exact", "small"])
def test_each_target_on_odd_adapters(tmp_path: Path, target: dict[str, Any], kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    b, a = torch.randn(16, 4, generator=generator), torch.randn(4, 16, generator=generator)
    if kind == "zero":
        b = torch.zeros(64, 4)
        a = torch.randn(4, 64, generator=generator)
    if kind == "exact":  # codes of 16 bits lose nothing of it
        b, a = torch.full((64, 1), 0.5), torch.full((1, 64), -0.5)
    lora = write_lora(tmp_path / "lora", products(b, a))
    try:
        record = compress(lora, tmp_path / "out", Recipe(transform="none", **target), report_html=False)
    except (RecipeError, ThresholdMissed) as error:
        assert str(error) and kind == "small"
        assert not (tmp_path / "out").exists()
        return
    if kind == "exact" and "max_error" in target:
        assert record["weight"]["relative_error"] <= target["max_error"]


@pytest.mark.parametrize(("seed", "bits", "error"), [(0, 4, 0.5), (0, 4, 0.3), (2, 8, 0.8), (3, 4, 0.7)])
def test_an_error_that_can_be_reached_is_reached(tmp_path: Path, seed: int, bits: int, error: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: type(one)(Factors(torch.randn(16, 4, generator=generator), torch.randn(4, 16, generator=generator)))
        for name, one in products(torch.zeros(16, 4), torch.zeros(4, 16)).items()
    }
    recipe = Recipe(transform="none", max_error=error, bits=bits)
    record = compress(write_lora(tmp_path / "lora", found), tmp_path / "out", recipe, report_html=False)
    assert record["weight"]["relative_error"] <= error


def test_sixteen_bits_of_what_they_hold_exactly(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", products(torch.full((64, 1), 0.5), torch.full((1, 64), 0.5)))
    record = compress(lora, tmp_path / "out", Recipe(bits=16), report_html=False)
    assert record["weight"]["relative_error"] < 1e-6


def test_ranks_by_hand_that_share_are_kept_in_codes(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(rank=8))
    record = compress(lora, tmp_path / "out", Recipe(ranks=(2, 1, 1), bits=4), report_html=False)
    assert record["compact"]["transform"] in ("ke", "ss")
    assert record["compact"]["ranks"]["intra"] == record["compact"]["ranks"]["inter"] == 1
