"""Names of older vision-language models, which PEFT maps: every route puts an adapter of them on today's model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel

from bslora_convert import Recipe, compress, expand, load_into
from tests.peft.routes import EXACT, logits, routes, stays_in_codes, write

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 8,
    "patch_size": 4,
}  # fmt: skip
PIXELS = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)
ATTENTION = {"q_proj": (32, 32), "v_proj": (16, 32)}


def llava() -> Any:
    torch.manual_seed(0)
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**TEXT), image_token_id=5, image_token_index=5,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config).eval()


def qwen2_vl() -> Any:
    torch.manual_seed(0)
    text = TEXT | {"rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision)).eval()


def gemma3() -> Any:
    torch.manual_seed(0)
    config = hf.Gemma3Config(
        text_config=hf.Gemma3TextConfig(**TEXT, head_dim=8),
        vision_config=hf.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
    )
    return hf.Gemma3ForConditionalGeneration(config).eval()


def of_layers(start: str, shapes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{start}.{layer}.self_attn.{name}": shape for layer in range(2) for name, shape in shapes.items()}


LANGUAGE = of_layers("language_model.model.layers", ATTENTION)
SIGHT = of_layers("vision_tower.vision_model.encoder.layers", {"q_proj": (32, 32), "v_proj": (32, 32)})
PROJECTOR = {"multi_modal_projector.linear_1": (32, 32), "multi_modal_projector.linear_2": (32, 32)}
IMAGE = {"pixel_values": PIXELS}


class Picture:
    """Ids in which four tokens stand for the picture's patches."""

    ids = torch.tensor([[7, 5, 5, 5, 5, 8, 9, 10], [11, 5, 5, 5, 5, 12, 13, 14]])


@pytest.fixture
def picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.peft.routes.IDS", Picture.ids)


def adapted(model: Any) -> set[str]:
    return {
        name.removeprefix("base_model.model.") for name, module in model.named_modules() if hasattr(module, "lora_A")
    }


TARGETS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj", "v_proj"]},
    {"target_modules": r".*\.(q_proj|v_proj)"},
    {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
]


@pytest.mark.usefixtures("picture")
@pytest.mark.parametrize(
    "recipe", [Recipe(transform="none", budget=0.5, dtype="float32"), Recipe(transform="none", bits=4)]
)
@pytest.mark.parametrize("targets", TARGETS)
def test_llava(tmp_path: Path, targets: dict[str, Any], recipe: Recipe) -> None:
    lora = write(tmp_path / "lora", LANGUAGE | SIGHT, **targets)
    found, claimed = routes(llava(), lora, tmp_path, recipe, **IMAGE)
    assert claimed < 0.5
    assert all(distance < max(3 * claimed, 1e-4) for distance in found.values()), (found, claimed)
    assert max(found.values()) - min(found.values()) < 0.01
    for directory in ("expanded", "uniform"):
        config = json.loads((tmp_path / directory / "adapter_config.json").read_text())
        assert {field: config[field] for field in targets} == targets
        assert config["r"] == config["lora_alpha"] == max([config["r"], *config["rank_pattern"].values()])
        assert config["rank_pattern"] == config["alpha_pattern"]
        assert len(set(config["rank_pattern"].values())) == len(config["rank_pattern"])


TODAY = (
    ("language_model.model.", "model.language_model."),
    ("vision_tower.vision_model.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
    ("visual.", "model.visual."),
    ("model.layers.", "model.language_model.layers."),
)


def todays(name: str) -> str:
    """An old name in today's model."""
    return next((new + name.removeprefix(old) for old, new in TODAY if name.startswith(old)), name)


TEXT_OF_QWEN = of_layers("model.layers", ATTENTION)
SIGHT_OF_QWEN = {
    f"visual.blocks.{layer}.attn.{name}": shape
    for layer in range(2)
    for name, shape in {"qkv": (96, 32), "proj": (32, 32)}.items()
}


@pytest.mark.usefixtures("picture")
@pytest.mark.parametrize(
    ("build", "shapes", "inputs"),
    [(llava, LANGUAGE | SIGHT | PROJECTOR, IMAGE), (qwen2_vl, TEXT_OF_QWEN | SIGHT_OF_QWEN, {})],
    ids=["llava", "qwen2_vl"],
)
def test_names_that_peft_does_not_map(tmp_path: Path, build: Any, shapes: Any, inputs: dict[str, Any]) -> None:
    """PEFT 0.21.2 leaves LLaVA's projector and all of Qwen2-VL out, with a warning; measured against today's names."""
    targets = sorted({name.rpartition(".")[2] for name in shapes})
    lora = write(tmp_path / "lora", shapes, target_modules=targets)
    today = write(tmp_path / "today", {todays(name): shape for name, shape in shapes.items()}, target_modules=targets)
    compress(lora, tmp_path / "compact", EXACT, report_html=False)
    plain = logits(build(), **inputs)
    expected = logits(PeftModel.from_pretrained(build(), str(today)), **inputs)
    model = build()
    with load_into(model, tmp_path / "compact"):
        attached = logits(model, **inputs)
    tuned = logits(PeftModel.from_pretrained(build(), str(tmp_path / "compact")), **inputs)
    for found in (attached, tuned):
        assert float((found - expected).norm()) < 1e-4 * float((expected - plain).norm())
    stays_in_codes(build, lora, tmp_path / "coded", **inputs)


def test_gemma3(tmp_path: Path) -> None:
    sight = of_layers("vision_tower.vision_model.encoder.layers", {"q_proj": (32, 32), "v_proj": (32, 32)})
    text = of_layers("language_model.model.layers", {"q_proj": (32, 32), "v_proj": (16, 32)})
    lora = write(tmp_path / "lora", text | sight, target_modules=["q_proj", "v_proj"])
    found, claimed = routes(gemma3(), lora, tmp_path, Recipe(transform="none", budget=0.5, dtype="float32"))
    assert all(distance < 3 * claimed for distance in found.values()), (found, claimed)
    assert max(found.values()) - min(found.values()) < 0.01


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*vision_tower.*"},
        {"target_modules": r".*language_model.*\.(q_proj|v_proj)"},
        {"target_modules": ["v_proj"]},  # less than the file has: an expression takes its place
        {"target_modules": "all-linear"},
        {"target_modules": list(LANGUAGE)},
    ],
)
def test_only_what_was_adapted_is_adapted_again(tmp_path: Path, targets: dict[str, Any]) -> None:
    lora = write(tmp_path / "lora", LANGUAGE, **targets)
    compress(lora, tmp_path / "compact", Recipe(transform="none", budget=0.5), report_html=False)
    for rank in (None, "uniform"):
        expand(tmp_path / "compact", tmp_path / "expanded", rank=rank, overwrite=True)
        model = PeftModel.from_pretrained(llava(), str(tmp_path / "expanded"))
        assert adapted(model) == {name.replace("language_model.model", "model.language_model") for name in LANGUAGE}


def test_a_compact_adapter_is_saved_in_todays_names(tmp_path: Path) -> None:
    lora = write(tmp_path / "lora", LANGUAGE | SIGHT, target_modules=["q_proj", "v_proj"])
    compress(lora, tmp_path / "compact", Recipe(transform="ke", ranks=(1, 1, 1), dtype="float32"), report_html=False)
    first = PeftModel.from_pretrained(llava(), str(tmp_path / "compact"))
    expected = logits(first)
    assert float((expected - logits(llava())).norm()) > 0.01
    first.save_pretrained(tmp_path / "again")
    modules = json.loads((tmp_path / "again" / "adapter_config.json").read_text())["modules"]
    assert "model.language_model.layers.{0-1}.self_attn.q_proj" in modules
    assert torch.equal(logits(PeftModel.from_pretrained(llava(), str(tmp_path / "again"))), expected)
