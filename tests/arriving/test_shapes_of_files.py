"""Files as people reported them: unusual numbers, types, ranks, names and configurations. What is claimed is true of the file."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bslora_convert import Recipe, compress, load_compact
from bslora_convert.errors import InputError, Refused

SHAPES = {f"model.layers.{layer}.self_attn.{name}": (96, 96) for layer in range(4) for name in ("q_proj", "v_proj")}
PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def written(
    place: Path, *, a: float = 0.05, b: float = 0.05, rank: int = 8, types: tuple[torch.dtype, torch.dtype] | None = None,
    shapes: dict[str, tuple[int, int]] = SHAPES, extra: dict[str, torch.Tensor] | None = None, **config: Any,
) -> Path:  # fmt: skip
    place.mkdir(parents=True, exist_ok=True)
    numbers, tensors = torch.Generator().manual_seed(0), dict(extra or {})
    of_a, of_b = types or (torch.float32, torch.float32)
    for name, (out, width) in shapes.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = (torch.randn(rank, width, generator=numbers) * a).to(of_a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = (torch.randn(out, rank, generator=numbers) * b).to(of_b)
    save_file(
        tensors, place / WEIGHTS, metadata={"format": "pt", "lora_adapter_metadata": '{"r": 3, "lora_alpha": 64}'}
    )
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    said = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 16,
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        **config,
    }
    (place / CONFIG).write_text(json.dumps(said))
    return place


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CONVERTED: dict[str, dict[str, Any]] = {
    "a scaling that float16 can't hold": {"lora_alpha": 2048, "a": 1e-3, "b": 200.0, "types": (HALF, HALF)},
    "a B that float16 hardly holds": {"lora_alpha": 1, "rank": 64, "a": 0.5, "b": 3e-6, "types": (HALF, HALF)},
    "factors of very different sizes": {"a": 1e4, "b": 1e-6, "types": (BRAIN, BRAIN)},
    "A in float32, B in bfloat16": {"types": (SINGLE, BRAIN)},
    "A in bfloat16, B in float32": {"types": (BRAIN, SINGLE), "shapes": dict.fromkeys(SHAPES, (48, 96))},
    "ranks above sizes": {"rank": 128, "lora_alpha": 256, "shapes": {**SHAPES, "model.layers.9.self_attn.g_proj": (1, 96)}},
    "rank one": {"rank": 1, "lora_alpha": 2},
    "a negative alpha": {"lora_alpha": -16},
    "rsLoRA": {"rank": 16, "use_rslora": True},
    "EVA": {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
    "CorDA, converted": {"init_lora_weights": True, "corda_config": {"corda_method": "ipm"}},
    "names of a wrapper's language part": {
        "shapes": {name.replace("model.", "model.language_model."): shape for name, shape in SHAPES.items()}
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CONVERTED)
def test_what_is_claimed_is_true_in_float64(tmp_path: Path, case: str) -> None:
    lora = written(tmp_path / "lora", **CONVERTED[case])
    config, tensors = json.loads((lora / CONFIG).read_text()), load_file(lora / WEIGHTS)
    root = math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    for number, recipe in enumerate((Recipe(transform="none", budget=1.0, dtype="float32"), Recipe(bytes=0.5))):
        claimed = compress(lora, tmp_path / f"{number}", recipe, report_html=False)["weight"]["relative_error"]
        form, lost, energy = load_compact(tmp_path / f"{number}").form, 0.0, 0.0
        for name in form.modules:
            a, b = (tensors[f"{PREFIX}{name}.lora_{side}.weight"].double() for side in "AB")
            wanted, delta = config["lora_alpha"] / root * (b @ a), form.delta(name)
            lost += float((delta.b.double() @ delta.a.double() - wanted).square().sum())
            energy += float(wanted.square().sum())
        assert math.sqrt(lost / energy) == pytest.approx(claimed, rel=1e-3, abs=1e-6)
        assert claimed < (1e-6, 0.02)[number]


@pytest.mark.parametrize("name", ["адаптер ✓ [x]' $HOME %20 #1", "with space"])
def test_any_path(tmp_path: Path, name: str) -> None:
    record = compress(written(tmp_path / name), tmp_path / f"{name} out", Recipe(bytes=0.5), report_html=False)
    assert record["source"]["path"] == str(tmp_path / name)


def test_a_configuration_from_windows(tmp_path: Path) -> None:
    lora = written(tmp_path / "lora", base_model_name_or_path="C:\\Users\\Jörg\\models\\Llama: 3")
    (lora / CONFIG).write_bytes((lora / CONFIG).read_text().replace(", ", ",\r\n").encode())
    assert compress(lora, tmp_path / "out", Recipe(bytes=0.5), report_html=False)["weight"]["relative_error"] < 0.02
    (lora / CONFIG).write_bytes(b"\xef\xbb\xbf" + (lora / CONFIG).read_bytes())
    with pytest.raises(InputError, match="BOM"):  # PEFT reads none either
        compress(lora, tmp_path / "never", report_html=False)


KEY = f"{PREFIX}model.layers.0.conv.lora_"
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a convolution": (
        {"extra": {f"{KEY}A.weight": torch.ones(8, 64, 4), f"{KEY}B.weight": torch.ones(64, 8, 1)}}, Refused, "convolution",
    ),
    "no rank": ({"extra": {f"{KEY}A.weight": torch.ones(0, 64), f"{KEY}B.weight": torch.ones(64, 0)}}, InputError, "is empty"),
    "a bias": ({"extra": {f"{PREFIX}model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(96)}}, Refused, "lora_bias"),
    "QA-LoRA": ({"use_qalora": True}, Refused, "QALoRA"),
    "Arrow": ({"arrow_config": {"top_k": 2}}, Refused, "Arrow"),
    "repeated layers": ({"layer_replication": [[0, 2], [0, 2]]}, Refused, "layer_replication"),
    "another type": ({"peft_type": "LOHA"}, Refused, "save_as_lora"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_told_faithfully_is_refused(tmp_path: Path, case: str) -> None:
    options, kind, words = REFUSED[case]
    with pytest.raises(kind, match=words):
        compress(written(tmp_path / "lora", **options), tmp_path / "out", report_html=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [lambda data: data + bytes(16), lambda data: data[:-64]], ids=["longer", "shorter"])
def test_a_file_of_another_length_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    lora = written(tmp_path / "lora")
    (lora / WEIGHTS).write_bytes(change((lora / WEIGHTS).read_bytes()))
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        compress(lora, tmp_path / "out", report_html=False)
