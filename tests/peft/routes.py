"""One adapter by four routes on one model: the source, the expanded LoRA, the compact one in PEFT, and `load_into`."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import bslora_convert.peft  # noqa: F401  registers the tuner
from bslora_convert import Recipe, compress, expand, load_into

IDS = torch.arange(3, 19).reshape(2, 8)
EXACT = Recipe(transform="none", budget=1.0, dtype="float32")


@torch.no_grad()
def logits(model: Any, **inputs: Any) -> Tensor:
    return model.eval()(input_ids=IDS, **inputs).logits.float()


def write(
    directory: Path, shapes: Mapping[str, tuple[int, int]], rank: int = 4, decay: float = 0.7, **config: Any
) -> Path:
    """A LoRA of random factors whose singular values fall off, at a scaling of two."""
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, width) in shapes.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, width, generator=generator) * 0.15
        tensors[f"base_model.model.{name}.lora_B.weight"] = (
            torch.randn(out, rank, generator=generator) * 0.3 * decay ** torch.arange(rank)
        )
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def routes(base: Any, lora: Path, place: Path, recipe: Recipe = EXACT, **inputs: Any) -> tuple[dict[str, float], float]:
    """How far each route's output is from the source's, as a share of what the source changes; and the error claimed."""
    record = compress(lora, place / "compact", recipe, report_html=False)
    expand(place / "compact", place / "expanded")
    expand(place / "compact", place / "uniform", rank="uniform")
    plain = logits(base, **inputs)
    source = logits(PeftModel.from_pretrained(copy.deepcopy(base), str(lora)), **inputs)
    effect = float((source - plain).norm())
    assert effect > 1e-3
    found = {
        name: logits(PeftModel.from_pretrained(copy.deepcopy(base), str(place / name)), **inputs)
        for name in ("expanded", "uniform", "compact")
    }
    model = copy.deepcopy(base)
    with load_into(model, place / "compact"):
        found["load_into"] = logits(model, **inputs)
    assert torch.equal(logits(model, **inputs), plain)
    return {name: float((out - source).norm()) / effect for name, out in found.items()}, record["weight"][
        "relative_error"
    ]


def stays_in_codes(build: Callable[[], Any], lora: Path, place: Path, **inputs: Any) -> None:
    """In codes a LoRA does on a model what the same numbers do as floats, and comes out of it as the file that it was."""
    compress(lora, place, Recipe(transform="none", bits=4), report_html=False)
    floats, codes = (PeftModel.from_pretrained(build(), str(place), resident=held) for held in ("floats", "codes"))
    expected = logits(floats, **inputs)
    assert torch.equal(logits(codes, **inputs), expected)
    codes.save_pretrained(place / "saved")
    weights = "adapter_model.safetensors"
    stored, again = load_file(place / weights), load_file(place / "saved" / weights)
    mine = [key for key in stored if ".bslora_" in key]
    assert all(torch.equal(again[key], stored[key]) for key in mine)
    if len(mine) == len(stored):  # PEFT has its own ways with embeddings of the base that travel along
        assert (place / "saved" / weights).read_bytes() == (place / weights).read_bytes()
    assert torch.equal(logits(PeftModel.from_pretrained(build(), str(place / "saved")), **inputs), expected)
    model = build()
    with load_into(model, place):
        attached = logits(model, **inputs)
    assert torch.allclose(attached, expected, atol=1e-4)


def same(found: dict[str, float], tolerance: float = 1e-4) -> None:
    assert all(distance < tolerance for distance in found.values()), found


def merges(model: Any, expected: Tensor, tolerance: float) -> None:
    """Merged into the base and taken out again, an adapter does the same."""
    model.merge_adapter()
    assert torch.allclose(logits(model), expected, atol=tolerance)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), expected, atol=tolerance)


def switches(model: Any, again: Path, expected: Tensor, plain: Tensor, tolerance: float) -> None:
    """Off, the base is as it was; loaded a second time in place of the first, an adapter does the same."""
    with model.disable_adapter():
        assert torch.allclose(logits(model), plain, atol=tolerance)
    model.load_adapter(str(again), "second")
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.allclose(logits(model), expected, atol=tolerance)
