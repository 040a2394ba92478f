"""Compact adapters with trained tokens under all that PEFT does with a LoRA's; and what it does with a LoRA alone."""

from pathlib import Path

import pytest
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner

from bslora_convert import Recipe, compress
from bslora_convert.errors import Refused
from bslora_convert.peft.model import BsloraModel
from tests.arriving.making import adapted, answers, apart, base, loaded

# What LoRA does in its own way, and compact adapters do as every tuner does, and why.
AS_EVERY_TUNER = {
    "_check_new_adapter_config": "there is nothing that two adapters on one model would have to agree about",
    "_convert_state_dict_for_initial_model": "no initialisation changes the base; every tuner refuses",
}
REFUSED = {"add_weighted_adapter", "subtract_mutated_init"}
INSIDE = {  # helpers of what is refused, of layers that LoRA makes itself, or of its losses
    "_check_add_weighted_adapter", "_create_new_module", "_generalized_task_arithmetic_weighted_adapter", "_get_kasa_loss",
    "_get_monteclora_loss", "_svd_generalized_task_arithmetic_weighted_adapter",
}  # fmt: skip


def own(kind: type) -> set[str]:
    return {
        name
        for name, value in vars(kind).items()
        if not name.startswith("__") and (callable(value) or isinstance(value, (staticmethod, classmethod, property)))
    }


def test_all_that_lora_overrides_is_overridden_or_known() -> None:
    """Fails when PEFT's LoRA overrides more: override it too, or say why not."""
    overridden = {name for name in own(LoraModel) if hasattr(BaseTuner, name)}
    assert overridden - own(BsloraModel) == set(AS_EVERY_TUNER)
    assert own(LoraModel) - overridden - own(BsloraModel) == INSIDE
    assert own(BsloraModel) >= REFUSED


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tokens")
    options = {"target_modules": ["q_proj", "v_proj"], "trainable_token_indices": {"embed_tokens": [3, 5, 60]}}
    lora = adapted(root / "lora", "qwen3", **options)
    compress(lora, root / "none", Recipe(transform="none", budget=1.0, dtype="float32"), report_html=False)
    compress(lora, root / "ke", Recipe(transform="ke", budget=0.9, max_rank="none"), report_html=False)
    compress(lora, root / "codes", Recipe(transform="none", bytes=0.9), report_html=False)
    return root


@pytest.mark.parametrize("kind", ["none", "ke", "codes"])
def test_merged_and_taken_off(tokens: Path, kind: str) -> None:
    wanted = answers(loaded(tokens / kind, "qwen3"))
    assert apart(answers(base("qwen3")), wanted) > 0.1
    assert apart(answers(loaded(tokens / kind, "qwen3").merge_and_unload()), wanted) < 1e-6
    if kind == "none":
        assert apart(wanted, answers(loaded(tokens / "lora", "qwen3"))) < 1e-5
        left = loaded(tokens / "lora", "qwen3").unload()
        assert apart(answers(loaded(tokens / kind, "qwen3").unload()), answers(left)) < 1e-12


def test_what_is_loras_alone_is_refused_in_words(tokens: Path, tmp_path: Path) -> None:
    model = loaded(tokens / "none", "qwen3")
    with pytest.raises(Refused, match="expand"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(Refused, match="never change the base"):
        model.base_model.subtract_mutated_init({}, "default")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        model.save_pretrained(tmp_path / "x", path_initial_model_for_weight_conversion=str(tokens / "none"))
