"""What `inspect` says of each kind of directory."""

import json
from pathlib import Path

import pytest
import torch

from bslora_convert.errors import InputError
from bslora_convert.layers.slots import reserved, slot_bytes, target_modules
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.verbs.compress import compress
from bslora_convert.verbs.inspect import inspect
from tests.planting import KINDS, random_products, write_lora

CONTRACT = {
    "kind",
    "convertible",
    "reasons",
    "base_model",
    "modules",
    "parameters",
    "bytes",
    "bytes_by_part",
    "ranks",
    "expanded_rank",
    "slot_bytes",
}
WIDTH = 2 * sum(out + width for out, width in KINDS.values())


def test_a_lora(real_adapter: Path) -> None:
    result = inspect(real_adapter)
    assert set(result) >= CONTRACT
    assert result["kind"] == "lora"
    assert result["convertible"] is True
    assert result["reasons"] == []
    assert result["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert result["modules"] == 210
    assert result["parameters"] == 4_884_480
    assert result["bytes_by_part"] == {"lora": 2 * 4_884_480}
    assert result["ranks"] == {"min": 16, "max": 16}
    # vLLM's figure: max_lora_rank times the sum of in and out of every module, two bytes each.
    assert result["slot_bytes"]["16"] == 2 * 4_884_480
    assert list(result["slot_bytes"]) == ["16", "32", "64", "128", "256", "320", "512"]
    spectra = {row["kind"]: row for row in result["spectra"]}
    assert 1 < spectra["self_attn.v_proj"]["stable_rank"] < 3
    assert 0.9 < spectra["self_attn.v_proj"]["energy_at_half_rank"] < 1


def test_a_compact_directory(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(rank=8))
    record = compress(
        lora, tmp_path / "out", Recipe(transform="ke", ranks=(2, 1, 3), shared_size=32), report_html=False
    )
    result = inspect(tmp_path / "out")
    assert set(result) >= CONTRACT
    assert result["kind"] == "bslora"
    assert result["convertible"] is False
    assert result["parameters"] == record["compact"]["parameters"]
    assert result["expanded_rank"] == 6
    assert result["shared_ranks"] == {"intra": 1, "inter": 3}
    assert sum(result["bytes_by_part"].values()) == 4 * result["parameters"]
    assert result["slot_bytes"]["8"] == 8 * WIDTH * 2


def test_whole_tables_stored_by_accident_show_up(tmp_path: Path) -> None:
    lora = write_lora(
        tmp_path / "lora",
        random_products(rank=2),
        extra={
            "base_model.model.model.embed_tokens.weight": torch.zeros(1000, 64),
            "base_model.model.lm_head.base_layer.weight": torch.zeros(1000, 64),
            "base_model.model.score.weight": torch.zeros(3, 64),
            "base_model.model.something.else": torch.zeros(5),
        },
        modules_to_save=["score"],
    )
    parts = inspect(lora)["bytes_by_part"]
    assert parts == {"lora": 4 * 2 * WIDTH, "embeddings": 2 * 256_000, "modules_to_save": 768, "other": 20}


def test_an_adapter_that_is_refused_is_still_described(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(rank=2), use_dora=True)
    result = inspect(lora)
    assert set(result) >= CONTRACT
    assert result["convertible"] is False
    assert "DoRA" in result["reasons"][0]
    assert result["modules"] == 14
    assert result["ranks"] == {"min": 2, "max": 2}


def test_the_authors_checkpoints_are_recognised(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(rank=2))
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "SHARELORA"}))
    result = inspect(lora)
    assert result["kind"] == "official-bslora"
    assert result["convertible"] is False


def test_damage_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        inspect(tmp_path / "nowhere")


def test_slots_start_at_the_first_step_that_holds_the_rank() -> None:
    shapes = {"a": (10, 20)}
    assert slot_bytes(shapes, 1) == {str(r): 60 * r for r in (1, 8, 16, 32, 64, 128, 256, 320, 512)}
    assert next(iter(slot_bytes(shapes, 17))) == "32"
    assert slot_bytes(shapes, 1000) == {}


def test_room_is_made_for_kinds_in_all_layers_and_for_what_is_packed_with_them() -> None:
    """The figures of a real vLLM: `benchmarks/buffers.py`."""
    shapes = {"model.layers.2.self_attn.q_proj": (256, 128), "model.layers.0.self_attn.v_proj": (64, 128)}
    found = reserved(shapes)
    assert set(found) == {f"model.layers.{at}.self_attn.{kind}_proj" for at in range(3) for kind in "qkv"}
    assert found["model.layers.1.self_attn.k_proj"] == (64, 128)
    assert reserved({"m.0.gate_proj": (8, 4)}) == {"m.0.gate_proj": (8, 4), "m.0.up_proj": (8, 4)}
    assert reserved({"m.0.k_proj": (2, 8)})["m.0.q_proj"] == (8, 8)
    assert reserved({"lm_head": (9, 4)}) == {"lm_head": (9, 4)}
    assert target_modules(shapes) == ["q_proj", "v_proj"]
    assert target_modules(["m.0.mlp.experts.3.up_proj", "m.0.q_proj"]) is None
