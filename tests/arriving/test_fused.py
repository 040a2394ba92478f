"""Adapters of fused experts: each expert's update is PEFT's, in the compact form, expanded, and merged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bslora_convert import Recipe, compress, expand, load_lora
from bslora_convert.errors import InputError, Refused
from bslora_convert.lora.fused import each_expert, fused
from bslora_convert.modules.factors import Factors
from tests.arriving.making import adapted, answers, apart, base, loaded

EXACT = Recipe(transform="none", budget=1.0, dtype="float32")
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all-linear": ("qwen3_moe", {}),
    "named": (
        "qwen3_moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "one": ("qwen3_moe", {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
    "last": ("gpt_oss", {"target_modules": [], "target_parameters": ["mlp.experts.down_proj"]}),
    "rslora": ("qwen3_moe", {"use_rslora": True, "alpha_pattern": {"experts.down_proj": 3}}),
    "deepseek": ("deepseek_v2", {}),
    "glm": ("glm4_moe", {}),
    "gpt-oss": (
        "gpt_oss",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj", "router.weight"],
        },
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fused")
    for name, (family, options) in CASES.items():
        adapted(root / name, family, **options)
    return root


@pytest.mark.parametrize("case", CASES)
def test_compact_and_expanded_are_pefts(made: Path, tmp_path: Path, case: str) -> None:
    family = CASES[case][0]
    wanted = answers(loaded(made / case, family))
    assert apart(answers(base(family)), wanted) > 0.05
    record = compress(made / case, tmp_path / "compact", EXACT, report_html=False)
    assert record["weight"]["relative_error"] < 1e-6
    assert not [note for note in record["notes"] if "rank" in note]
    assert apart(answers(loaded(tmp_path / "compact", family)), wanted) < 1e-5
    assert apart(answers(loaded(tmp_path / "compact", family).merge_and_unload()), wanted) < 1e-5
    expand(tmp_path / "compact", tmp_path / "lora")
    assert apart(answers(loaded(tmp_path / "lora", family)), wanted) < 1e-5


def test_smaller_results_do_in_peft_what_they_claim(made: Path, tmp_path: Path) -> None:
    for transform in ("none", "ke"):
        compact = tmp_path / transform
        compress(
            made / "all-linear", compact, Recipe(transform=transform, bytes=0.6, max_rank="none"), report_html=False
        )
        wanted = answers(loaded(compact, "qwen3_moe"))
        expand(compact, tmp_path / f"{transform}-lora", dtype="float32")
        assert apart(answers(loaded(tmp_path / f"{transform}-lora", "qwen3_moe")), wanted) < 1e-5


def test_without_the_field_names_and_shapes_say_it(made: Path, tmp_path: Path) -> None:
    config = json.loads((made / "all-linear" / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({k: v for k, v in config.items() if k != "target_parameters"})
    )
    save_file(load_file(made / "all-linear" / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    plain, bare = load_lora(made / "all-linear"), load_lora(tmp_path)
    assert list(plain.modules) == list(bare.modules)
    for name, module in plain.modules.items():
        other = bare.modules[name]
        assert (other.rank, other.scaling) == (module.rank, module.scaling)
        assert torch.equal(other.a, module.a) and torch.equal(other.b, module.b)


def test_what_is_not_said_is_refused(made: Path, tmp_path: Path) -> None:
    config = json.loads((made / "one" / "adapter_config.json").read_text())
    for name, change, kind, words in (
        ("unsaid", {"target_parameters": None}, Refused, "is not said by target_parameters"),
        ("unknown", {"target_parameters": ["experts.w1"]}, Refused, r"not said by target_parameters \(experts\.w1\)"),
        ("rank", {"r": 3, "rank_pattern": {}}, InputError, "not those of experts of rank 3"),
    ):
        place = tmp_path / name
        place.mkdir()
        (place / "adapter_config.json").write_text(json.dumps({**config, **change}))
        save_file(load_file(made / "one" / "adapter_model.safetensors"), place / "adapter_model.safetensors")
        with pytest.raises(kind, match=words):
            load_lora(place)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))
def test_taken_apart_and_put_together(experts: int, rank: int, out: int, width: int) -> None:
    numbers = torch.Generator().manual_seed(0)
    a = torch.randn(experts * rank, width, generator=numbers)
    b = torch.randn(out, rank * experts, generator=numbers)
    holder = "model.layers.0.mlp.experts"
    parts = {
        name: Factors(own_b, own_a) for name, own_a, own_b in each_expert(a, b, rank, f"{holder}.gate_up_proj", "x")
    }
    assert list(parts) == [f"{holder}.gate_up_proj.{expert}" for expert in range(experts)]
    dense = torch.einsum("ore,eri->eoi", b.view(out, rank, experts), a.view(experts, rank, width))
    for expert, factors in enumerate(parts.values()):
        assert torch.allclose(factors.b @ factors.a, dense[expert], atol=1e-5)
    if experts > 2:
        with pytest.raises(InputError, match="some are missing"):
            fused({name: factors for name, factors in parts.items() if not name.endswith(".1")})
    (whole,) = fused(parts).values()
    assert (whole.name, whole.rank) == (holder, rank)
    assert torch.equal(whole.factors.a, a) and torch.equal(whole.factors.b, b)
