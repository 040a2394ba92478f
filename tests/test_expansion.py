"""Back to PEFT: the expanded adapter is the form, in real PEFT forward passes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bslora_convert.bslora.storage import load_compact
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.lora import load_lora
from bslora_convert.lora.config import LoraConfig
from bslora_convert.lora.writer import peft_config
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.verbs.compress import compress
from bslora_convert.verbs.expand import expand
from tests.conftest import FIXTURES
from tests.planting import random_products, write_lora

BASE = FIXTURES / "tiny" / "base"
ADAPTER = FIXTURES / "tiny" / "gsm8k"
IDS = torch.arange(2, 66).reshape(2, 32)


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits


def with_deltas(compact: Path) -> Any:
    """The base model with every delta of the form added to its weights by hand."""
    model = base()
    form = load_compact(compact).form
    with torch.no_grad():
        for name in form.modules:
            delta = form.delta(name)
            model.get_submodule(name).weight += delta.b @ delta.a
    return model


@pytest.mark.parametrize("transform", ["ke", "ss", "gt", "none"])
def test_real_peft_gives_the_forms_forward_pass(tmp_path: Path, transform: str) -> None:
    recipe = Recipe(
        transform=transform, budget=0.6, dtype="float32", shared_size=32 if transform in ("ke", "gt") else None
    )
    compress(ADAPTER, tmp_path / "compact", recipe, report_html=False)
    result = expand(tmp_path / "compact", tmp_path / "lora")
    assert result["relative_error"] < 1e-6
    expanded = logits(PeftModel.from_pretrained(base(), str(tmp_path / "lora")))
    by_hand = logits(with_deltas(tmp_path / "compact"))
    effect = (logits(base()) - by_hand).norm()
    assert float((expanded - by_hand).norm() / effect) < 1e-5


def test_the_whole_budget_gives_the_source_back(tmp_path: Path) -> None:
    compress(ADAPTER, tmp_path / "compact", Recipe(transform="none", budget=1.0, dtype="float32"), report_html=False)
    expand(tmp_path / "compact", tmp_path / "lora")
    first = logits(PeftModel.from_pretrained(base(), str(ADAPTER)))
    second = logits(PeftModel.from_pretrained(base(), str(tmp_path / "lora")))
    assert float((first - second).norm() / (first - logits(base())).norm()) < 1e-5


def test_scaling_is_one_for_every_reader(tmp_path: Path) -> None:
    compress(ADAPTER, tmp_path / "compact", Recipe(transform="ke", budget=0.5, shared_size=32))
    expand(tmp_path / "compact", tmp_path / "lora", base_model="my-org/my-model")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "expansion.json",
    ]
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["lora_alpha"] == config["r"]
    assert config["rank_pattern"] == config["alpha_pattern"] != {}
    assert config["use_rslora"] is False
    assert config["base_model_name_or_path"] == "my-org/my-model"
    for name, module in load_lora(tmp_path / "lora").modules.items():
        assert module.scaling == 1.0
        assert module.rank == LoraConfig.parse(config, tmp_path).expected_rank(name)
    assert config["r"] == max(module.rank for module in load_lora(tmp_path / "lora").modules.values())


def test_rank_truncates_and_uniform_pads(tmp_path: Path) -> None:
    compress(
        ADAPTER,
        tmp_path / "compact",
        Recipe(transform="ke", budget=0.6, dtype="float32", shared_size=32),
        report_html=False,
    )
    whole = expand(tmp_path / "compact", tmp_path / "whole")
    short = expand(tmp_path / "compact", tmp_path / "short", rank=3)
    padded = expand(tmp_path / "compact", tmp_path / "padded", rank="uniform")
    assert short["ranks"]["max"] == 3
    assert 0 < short["relative_error"] < 1
    assert padded["ranks"]["min"] == padded["ranks"]["max"] == whole["ranks"]["max"]
    assert padded["relative_error"] < 1e-6
    form = load_compact(tmp_path / "compact").form
    written = load_lora(tmp_path / "short")
    lost = energy = 0.0
    for name in form.modules:
        delta, factors = form.delta(name), written.modules[name].factors()
        matrix = delta.b.double() @ delta.a.double()
        best = float(torch.linalg.svdvals(matrix)[3:].square().sum())
        mine = float((matrix - factors.b.double() @ factors.a.double()).square().sum())
        assert mine == pytest.approx(best, rel=1e-4, abs=1e-9)
        lost, energy = lost + mine, energy + float(matrix.square().sum())
    assert short["relative_error"] == pytest.approx((lost / energy) ** 0.5, abs=1e-6)
    first = logits(PeftModel.from_pretrained(base(), str(tmp_path / "whole")))
    assert torch.allclose(first, logits(PeftModel.from_pretrained(base(), str(tmp_path / "padded"))), atol=1e-5)


def test_modules_without_any_part_are_written_as_zero(tmp_path: Path) -> None:
    products = random_products(rank=2)
    lora = write_lora(tmp_path / "lora", products)
    compress(lora, tmp_path / "compact", Recipe(transform="none", budget=0.03), report_html=False)
    ranks = [module.local.rank for module in load_compact(tmp_path / "compact").form.modules.values()]
    assert min(ranks) == 0
    assert expand(tmp_path / "compact", tmp_path / "out")["ranks"]["min"] == 1
    assert set(load_lora(tmp_path / "out").modules) == set(products)


def test_bad_ranks_are_named(tmp_path: Path) -> None:
    for rank in (0, -1, "all", 1.5):
        with pytest.raises(RecipeError, match="rank is"):
            expand(tmp_path, tmp_path / "out", rank=rank)
    with pytest.raises(RecipeError, match="dtype is"):
        expand(tmp_path, tmp_path / "out", dtype="int4")


def test_names_that_end_alike_keep_their_own_rank(tmp_path: Path) -> None:
    """PEFT lets a pattern match the end of a longer name; the longer name's own pattern must come first."""
    ranks = {"layers.0.q": 4, "decoder.layers.0.q": 5, "other": 1, "another": 1}
    config = LoraConfig.parse(peft_config(ranks, {}), tmp_path)
    for name, rank in ranks.items():
        assert config.expected_rank(name) == rank
        assert config.scaling(name, rank) == 1.0


def test_the_compact_adapter_is_never_its_own_output(tmp_path: Path) -> None:
    compress(
        write_lora(tmp_path / "lora", random_products(layers=1)),
        tmp_path / "p" / "c",
        Recipe(transform="none"),
        report_html=False,
    )
    for out in (tmp_path / "p" / "c", tmp_path / "p"):
        with pytest.raises(InputError, match="would replace the source"):
            expand(tmp_path / "p" / "c", out, overwrite=True)
    assert load_compact(tmp_path / "p" / "c").form.modules
