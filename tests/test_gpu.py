"""On a GPU: verbs that compute do there what they do on a CPU; codes, and adapters held as codes, are the same to the bit."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bslora_convert import Recipe, Training, analyze, batch, compare, compress, finetune, load_into, verify
from bslora_convert.baselines import BASELINES
from bslora_convert.bslora.codes.trellis import TRELLIS_WIDTHS, tables
from bslora_convert.coding.encode import encode
from bslora_convert.coding.viterbi import paths, paths_on_device
from bslora_convert.comparison.forms import IN_CODES, UNBIASED
from bslora_convert.peft import BsloraConfig, load_many
from tests.behaviour.conftest import BASE, LORA, PROMPTS, TINY

pytestmark = pytest.mark.gpu
WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(2, 66).reshape(4, 16)
FORMS = {
    "none": {"transform": "none"},
    "ke": {"transform": "ke", "shared_size": 32, "min_shared": 1},
    "gt": {"transform": "gt", "shared_size": 16, "min_shared": 1},
    "ss": {"transform": "ss", "min_shared": 1},
}


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval().cuda()


@torch.no_grad()
def logits(model: Any, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS.cuda(), **options).logits
    return found


def converted(place: Path, source: Path = LORA, **options: Any) -> dict[str, Any]:
    return dict(compress(source, place, Recipe(**options), report_html=False))


@pytest.mark.parametrize("width", TRELLIS_WIDTHS)
def test_the_search_finds_the_same_codes(width: int) -> None:
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(width))
    table = tables()[width]
    assert torch.equal(
        torch.from_numpy(paths(x.numpy(), table.numpy(), width)), paths_on_device(x.cuda(), table, width)
    )
    here, there = encode(x, [width] * 5), encode(x.cuda(), [width] * 5)
    assert torch.equal(here.coded.codes, there.coded.codes) and torch.equal(here.decode(), there.decode())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gain", ["unbiased", "least-squares"])
def test_floats_are_as_near(tmp_path: Path, form: str, gain: str) -> None:
    found = {
        device: converted(tmp_path / device, **FORMS[form], budget=0.3, gain=gain, device=device)["weight"]
        for device in ("cpu", "cuda")
    }
    for figure in ("relative_error", "gain"):
        assert found["cuda"][figure] == pytest.approx(found["cpu"][figure], rel=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_codes_are_the_same_file(tmp_path: Path, form: str) -> None:
    for device in ("cpu", "cuda"):
        converted(tmp_path / device, **FORMS[form], bytes=0.2, device=device)
    assert (tmp_path / "cpu" / WEIGHTS).read_bytes() == (tmp_path / "cuda" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("metric", ["auto", "input", "output", "two-sided"])
@pytest.mark.parametrize("size", [{"bytes": 0.1}, {"budget": 0.25}], ids=["codes", "floats"])
def test_prompts_help(tmp_path: Path, metric: str, size: dict[str, float]) -> None:
    evidence = {"base_model": str(BASE), "prompts": str(PROMPTS), "metric": metric}
    found = {}
    for device in ("cpu", "cuda"):
        converted(tmp_path / device, transform="none", **size, **evidence, device=device)
        found[device] = verify(
            tmp_path / device, LORA, BASE, prompts=PROMPTS, device=device, dtype="float32", max_new_tokens=0
        )
    assert found["cuda"]["kl"] == pytest.approx(found["cpu"]["kl"], rel=0.1)


def test_the_default_with_prompts(tmp_path: Path) -> None:
    record = converted(tmp_path / "out", base_model=str(BASE), prompts=str(PROMPTS), device="cuda")
    assert record["weight"]["gain"] == pytest.approx(1, abs=0.1)
    found = verify(
        tmp_path / "out", LORA, BASE, prompts=PROMPTS, device="cuda", dtype="float32", max_new_tokens=8, limit=8
    )
    assert found["device"] == "cuda" and found["retention"] > 0.9


@pytest.mark.parametrize("size", [{"bytes": 0.05}, {"budget": 0.3}], ids=["codes", "floats"])
def test_distillation(tmp_path: Path, size: dict[str, float]) -> None:
    recipe = Recipe(
        transform="ke", **size, base_model=str(BASE), prompts=str(PROMPTS), metric="two-sided", finetune=str(PROMPTS),
        device="cuda",
    )  # fmt: skip
    record = compress(LORA, tmp_path / "out", recipe, training=Training(max_steps=4, evaluate_every=2))
    assert record["training"]["device"] == "cuda" and record["training"]["peak_bytes"] > 0
    assert record["training"]["heldout_kl_after"] <= record["training"]["heldout_kl_before"]
    found = verify(tmp_path / "out", LORA, BASE, prompts=PROMPTS, device="cuda", limit=8, max_new_tokens=4)
    on_cpu = verify(tmp_path / "out", LORA, BASE, prompts=PROMPTS, device="cpu", limit=8, max_new_tokens=0)
    assert found["kl"] == pytest.approx(on_cpu["kl"], rel=0.2)
    again = finetune(
        tmp_path / "out", tmp_path / "more", LORA, str(BASE), PROMPTS, device="cuda", training=Training(max_steps=2)
    )
    assert again["training"]["device"] == "cuda"


@pytest.mark.parametrize("kinds", [BASELINES, IN_CODES, UNBIASED], ids=["floats", "codes", "unbiased"])
def test_rivals(kinds: Mapping[str, Any]) -> None:
    rows = {
        device: compare(
            LORA, budgets=[0.25], forms=list(kinds), base_model=str(BASE), prompts=PROMPTS, limit=8, device=device
        )["rows"]
        for device in ("cpu", "cuda")
    }
    for here, there in zip(rows["cpu"], rows["cuda"], strict=True):
        assert there["form"] == here["form"]
        assert there["relative_error"] == pytest.approx(here["relative_error"], rel=0.05), here["form"]


def test_redundancy() -> None:
    here, there = (
        analyze(LORA, base_model=str(BASE), prompts=PROMPTS, limit=4, draws=2, device=device)
        for device in ("cpu", "cuda")
    )
    assert json.dumps(there) and there.keys() == here.keys()


@pytest.mark.parametrize(
    "options",
    [{"bytes": 0.1}, {"bytes": 0.1, "base_model": str(BASE), "prompts": str(PROMPTS)}],
    ids=["codes", "prompts"],
)
def test_a_library(tmp_path: Path, options: dict[str, Any]) -> None:
    for name in ("banking77", "gsm8k"):
        shutil.copytree(TINY / name, tmp_path / "library" / name)
    recipe = Recipe(transform="none", device="cuda", **options)
    summary = batch(tmp_path / "library", tmp_path / "out", recipe)
    assert summary["ok"] == 2


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny adapters in codes, by the names of FORMS."""
    place = tmp_path_factory.mktemp("library")
    for name, form in FORMS.items():
        converted(place / name, TINY / "gsm8k", **form, bytes=0.25)
    return place


@pytest.mark.parametrize("form", FORMS)
def test_codes_do_what_floats_do_to_the_last_bit(library: Path, form: str) -> None:
    floats, codes = (
        PeftModel.from_pretrained(base(), str(library / form), resident=held) for held in ("floats", "codes")
    )
    expected = logits(floats)
    assert not torch.equal(expected, logits(base()))
    for room in (1 << 30, 0):  # the whole adapter decoded, and module by module
        next(m.table for m in codes.modules() if hasattr(m, "table")).decoded.limit = room
        assert torch.equal(logits(codes), expected)
        model = base()
        with load_into(model, library / form, decoded_bytes=room):
            torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    codes.cpu()
    here = codes(input_ids=IDS).logits
    torch.testing.assert_close(here, expected.cpu(), rtol=1e-3, atol=1e-3)


def test_every_row_of_a_batch_names_its_adapter(library: Path) -> None:
    names = list(FORMS)
    floats, codes = (load_many(base(), library, names, resident=held) for held in ("floats", "codes"))
    for rows in (["ke", "__base__", "ss", "ke"], ["none", "gt", "ke", "ss"]):
        assert torch.equal(logits(codes, adapter_names=rows), logits(floats, adapter_names=rows))


@pytest.mark.parametrize("transform", ["ke", "gt", "ss"])
def test_training_from_the_start(tmp_path: Path, transform: str) -> None:
    model = base()
    config = BsloraConfig.new(
        model, transform, (2, 3, 4), shared_size=None if transform == "ss" else 16, task_type="CAUSAL_LM"
    )
    tuned = get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=IDS.cuda(), labels=IDS.cuda()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    expected = logits(tuned)
    tuned.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(), str(tmp_path))), expected, rtol=1e-4, atol=1e-4)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / WEIGHTS).values())
