"""Trained tokens and saved tables are part of the original and of the compact adapter alike, wherever behaviour is measured."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import bslora_convert.peft  # noqa: F401  registers the tuner
from bslora_convert import Recipe, compress, finetune, load_into, load_lora, verify
from bslora_convert.behaviour.adapter import Adapter
from bslora_convert.behaviour.attach import Attached
from bslora_convert.errors import InputError
from bslora_convert.recipe.training import Training
from tests.conftest import FIXTURES

BASE = FIXTURES / "tiny" / "base"
PROMPTS = FIXTURES / "tiny" / "gsm8k-heldout.jsonl"
IDS = torch.tensor([[3, 60, 5, 101, 7, 9, 60, 100]])
CASES: dict[str, dict[str, Any]] = {
    "named-tokens": {"trainable_token_indices": {"embed_tokens": [3, 5, 60, 100, 101]}},
    "tokens": {"trainable_token_indices": [3, 5, 60, 100]},
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
}


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("behaving")
    for name, options in CASES.items():
        config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options)
        model, numbers = get_peft_model(base(), config), torch.Generator().manual_seed(1)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += torch.randn(parameter.shape, generator=numbers) * 0.05
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(root / name)
        compress(root / name, root / f"{name}-compact", Recipe(transform="none", bytes=0.4), report_html=False)
    return root


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_they_are_on_the_model_as_peft_has_them(made: Path, case: str) -> None:
    model = base()
    plain, adapter = logits(model), Adapter.of_lora(load_lora(made / case), made / case, "")
    with Attached(model, adapter.form, adapter.carried, case, enabled=False):
        found = logits(model)
    wanted = logits(PeftModel.from_pretrained(base(), str(made / case)).eval())
    assert float((wanted - plain).norm() / wanted.norm()) > 0.01
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), plain)
    compact = logits(PeftModel.from_pretrained(base(), str(made / f"{case}-compact")).eval())
    with load_into(model, made / f"{case}-compact"):
        torch.testing.assert_close(logits(model), compact, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("case", ["named-tokens", "head"])
def test_measured_fitted_and_distilled(made: Path, tmp_path: Path, case: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[:20]))
    there = verify(made / f"{case}-compact", made / case, str(BASE), prompts=rows, max_new_tokens=0)
    assert there.kl < 0.01 * there.base_kl
    recipe = Recipe(transform="none", bytes=0.3, base_model=str(BASE), prompts=str(rows))
    assert compress(made / case, tmp_path / "fitted", recipe, report_html=False).evidence is not None
    done = finetune(
        made / f"{case}-compact", tmp_path / "tuned", made / case, str(BASE), rows, training=Training(max_steps=2),
        report_html=False,
    )  # fmt: skip
    assert done.training is not None
    assert done.training.heldout_kl_after <= done.training.heldout_kl_before


@pytest.mark.parametrize("said", [None, {"other": [3, 5, 60, 100, 101]}, {"embed_tokens": [3]}, {"embed_tokens": "3"}])
def test_rows_that_nobody_names_are_refused(made: Path, tmp_path: Path, said: Any) -> None:
    for file in (made / "named-tokens").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": said}))
    with pytest.raises(InputError, match="does not say which"):
        Adapter.of_lora(load_lora(tmp_path), tmp_path, "")
    rows = {"embed_tokens": [3, 5, 60, 100, 10**9]}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": rows}))
    adapter = Adapter.of_lora(load_lora(tmp_path), tmp_path, "")
    with pytest.raises(InputError, match="don't fit the base model"):
        Attached(base(), adapter.form, adapter.carried, "x")
