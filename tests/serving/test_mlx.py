"""`--format mlx` by MLX-LM's rules, and in MLX-LM itself where it is installed (`pip install 'mlx[cpu]' mlx-lm`)."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bslora_convert import Recipe, compress, expand, load_compact
from bslora_convert.errors import Refused
from bslora_convert.modules.names import kind_of
from tests.conftest import FIXTURES
from tests.serving.test_engines import compact, layered

BASE = FIXTURES / "tiny" / "base"


def test_the_layout_is_that_of_mlx_lm(tmp_path: Path) -> None:
    source = compact(tmp_path / "c", layered("model.layers.1.self_attn.k_proj"))
    record = expand(source, tmp_path / "out", engine="mlx")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapters.safetensors", "expansion.json",
    ]  # fmt: skip
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    form = load_compact(source).form
    largest = max(form.expanded_rank(name) for name in form.modules)
    assert config["lora_parameters"] == {
        "rank": largest, "scale": 1.0, "dropout": 0.0, "keys": sorted({kind_of(name) for name in form.modules}),
    }  # fmt: skip
    assert config["fine_tune_type"] == "lora"
    assert max(config["num_layers"], 0) == 0  # layers[-0:], every one
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    assert set(tensors) == {f"{name}.{side}" for name in form.modules for side in ("lora_a", "lora_b")}
    for name in form.modules:
        a, b, delta = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], form.delta(name)
        assert (a.shape, b.shape) == ((48, largest), (largest, 64))
        torch.testing.assert_close((a @ b).T, delta.b @ delta.a, rtol=1e-5, atol=1e-5)
    assert record["served"] is None
    assert record["relative_error"] < 1e-6


def test_what_mlx_can_not_hold_is_refused(tmp_path: Path) -> None:
    source = compact(tmp_path / "c", {"model.embed_tokens": 2}, model_embed_tokens="embedding")
    with pytest.raises(Refused, match="MLX-LM can't serve it"):
        expand(source, tmp_path / "out", format="mlx")


def run_mlx(base: Path, adapter: Path | None, ids: torch.Tensor) -> torch.Tensor:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    model, _ = load_model(base)
    if adapter is not None:
        from mlx_lm.tuner.utils import load_adapters

        load_adapters(model, str(adapter))
    model.set_dtype(mx.float32)
    model.eval()
    return torch.from_numpy(np.array(model(mx.array(ids.numpy())), copy=True)).float()


@pytest.mark.skipif(importlib.util.find_spec("mlx_lm") is None, reason="mlx-lm is not installed")
def test_mlx_lm_itself_gives_what_peft_gives(tmp_path: Path) -> None:
    recipe = Recipe(transform="ke", budget=0.5, dtype="float32", shared_size=32)
    compress(FIXTURES / "tiny" / "gsm8k", tmp_path / "c", recipe, report_html=False)
    expand(tmp_path / "c", tmp_path / "lora")
    expand(tmp_path / "c", tmp_path / "mlx", engine="mlx")
    ids = torch.arange(2, 34)[None]
    base: Any = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    with torch.no_grad():
        bare = base(input_ids=ids).logits.log_softmax(-1)
        meant = PeftModel.from_pretrained(base, str(tmp_path / "lora"))(input_ids=ids).logits.log_softmax(-1)
    assert float((run_mlx(BASE, None, ids).log_softmax(-1) - bare).abs().max()) < 1e-3
    found = run_mlx(BASE, tmp_path / "mlx", ids).log_softmax(-1)
    assert float((meant - bare).abs().max()) > 0.5
    assert float((found - meant).abs().max()) < 1e-3
