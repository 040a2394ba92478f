"""`--init DIR`: an adapter that training went on from is known to writer and reader, and so is a checkpoint of step 0."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import bslora_convert.peft  # noqa: F401  registers the tuner
from bslora_convert import Recipe, batch, compress, expand, load_compact, load_into, load_lora
from bslora_convert.bslora.common import commons_in
from bslora_convert.bslora.storage import load_coded
from bslora_convert.coding.encode import code_pair
from bslora_convert.conversion.initial import look_for
from bslora_convert.errors import RecipeError
from bslora_convert.modules.factors import Factors
from tests.conftest import FIXTURES
from tests.planting import drawn_lora, forget_draws

TINY = FIXTURES / "tiny"
WEIGHTS = "adapter_model.safetensors"
NEAR = Recipe(transform="none", max_error=0.1)


def went_on(source: Path, place: Path, by: float, seed: int = 0) -> Path:
    """The adapter after more training: A and B changed by normal noise of this relative size."""
    shutil.copytree(source, place)
    tensors, noise = load_file(place / WEIGHTS), torch.Generator().manual_seed(seed)
    for key, tensor in tensors.items():
        step = torch.randn(tensor.shape, generator=noise) * tensor.float().square().mean().sqrt()
        tensors[key] = (tensor.float() + by * step).to(tensor.dtype)
    save_file(tensors, place / WEIGHTS, metadata={"format": "pt"})
    return place


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that went on from another, converted with that known and without."""
    root = tmp_path_factory.mktemp("continued")
    later = went_on(TINY / "gsm8k", root / "later", 0.1)
    compress(later, root / "with" / "c", NEAR.but(init=str(TINY / "gsm8k")), report_html=False)
    compress(later, root / "without", NEAR, report_html=False)
    return root


def record_of(place: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((place / "fidelity.json").read_text())
    return found


def test_what_came_before_makes_the_file_much_smaller(made: Path) -> None:
    known, alone = record_of(made / "with" / "c"), record_of(made / "without")
    assert known["weight"]["relative_error"] <= 0.1  # type: ignore[operator]
    assert known["compact"]["bytes"] < 0.5 * alone["compact"]["bytes"]  # type: ignore[operator]
    assert known["initialisation"]["generator"] == "adapters"
    (common,) = commons_in(made / "with")
    assert known["initialisation"]["file"] == common.name and sorted(p.name for p in (made / "with" / "c").iterdir()) == [
        "README.md", "adapter_config.json", WEIGHTS, "fidelity.json",
    ]  # fmt: skip
    layout = load_compact(made / "with" / "c").layout
    assert any("local_B" in entry.initial for entry in layout.modules.values())


def test_every_reader_puts_both_sides_together(made: Path, tmp_path: Path) -> None:
    forget_draws()
    place = made / "with" / "c"
    form = load_compact(place).form
    expand(place, tmp_path / "lora")
    back = load_lora(tmp_path / "lora")
    for name in form.modules:
        delta, found = form.delta(name), back.modules[name].factors()
        assert torch.allclose(delta.b @ delta.a, found.b @ found.a, atol=1e-5)
    base, ids = AutoModelForCausalLM.from_pretrained(TINY / "base").eval(), torch.arange(2, 18)[None]
    with torch.no_grad():
        with load_into(base, place):
            wanted = base(input_ids=ids).logits
        for resident in ("codes", "floats"):
            fresh = AutoModelForCausalLM.from_pretrained(TINY / "base")
            tuned = PeftModel.from_pretrained(fresh, str(place), resident=resident).eval()
            assert torch.allclose(tuned(input_ids=ids).logits, wanted, atol=1e-4)


def test_decoded_vectors_are_dense_products(made: Path) -> None:
    from bslora_convert.bslora.codes.file import coded_tensors

    read, coded = load_compact(made / "with" / "c"), load_coded(made / "with" / "c")
    initial = read.initial
    assert initial is not None
    held = coded_tensors(coded.codes, read.layout.stored())  # type: ignore[union-attr]
    for name, module in read.form.modules.items():
        for side, found in (("A", module.local.a), ("B", module.local.b.T)):
            key, base = f"{name}.bslora_local_{side}", initial.base(name, side)
            dense = held[key].decode().double()
            if base is not None:
                dense += held[f"{key}_mix"].decode().double() @ base.double()
            assert torch.equal(found, dense.float().to(read.dtype)), key


def test_a_pair_with_both_sides_known_loses_what_dense_says() -> None:
    generator = torch.Generator().manual_seed(0)
    b0, a0 = torch.randn(8, 300, generator=generator), torch.randn(8, 400, generator=generator)
    target = Factors(
        (b0 + 0.1 * torch.randn(8, 300, generator=generator)).T, a0 + 0.1 * torch.randn(8, 400, generator=generator)
    )
    u, s, v = torch.linalg.svd(target.b @ target.a, full_matrices=False)
    start = Factors(u[:, :8] * s[:8].sqrt(), s[:8].sqrt()[:, None] * v[:8])
    for widths in ([((8, 1), (8, 1))] * 8, [((6, 0), (8, 2))] * 4 + [((0, 3), (0, 3))] * 4):
        pair = code_pair(target, start, widths, (b0, a0))
        made = pair.factors()
        dense = float((target.b.double() @ target.a.double() - made.b.double() @ made.a.double()).square().sum())
        assert pair.lost == pytest.approx(dense, rel=1e-5)
    fine = code_pair(target, start, [((8, 2), (8, 2))] * 8, (b0, a0)).lost
    assert fine < 0.2 * code_pair(target, start, [((0, 2), (0, 2))] * 8).lost


def test_a_library_has_its_start_once(made: Path, tmp_path: Path) -> None:
    for number in range(2):
        went_on(TINY / "gsm8k", tmp_path / "in" / f"t{number}", 0.1, number)
    batch(tmp_path / "in", tmp_path / "out", NEAR.but(init=str(TINY / "gsm8k")), workers=0, report_html=False)
    (common,) = commons_in(tmp_path / "out")
    for number in range(2):
        assert record_of(tmp_path / "out" / f"t{number}")["initialisation"]["file"] == common.name


def test_a_checkpoint_of_step_0_gives_its_seed(tmp_path: Path) -> None:
    later = drawn_lora(TINY / "gsm8k", tmp_path / "later", 42, changed=0.2)
    start = drawn_lora(TINY / "gsm8k", tmp_path / "start", 42, changed=0.0)
    tensors = {
        key: torch.zeros_like(tensor) if "lora_B" in key else tensor
        for key, tensor in load_file(start / WEIGHTS).items()
    }
    save_file(tensors, start / WEIGHTS, metadata={"format": "pt"})
    known = look_for(load_lora(later), str(start))
    assert known is not None and known.initial.key == 42 and known.common is None


def test_a_stranger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no module of .* is like its"):
        compress(TINY / "gsm8k", tmp_path / "c", NEAR.but(init=str(TINY / "banking77")), report_html=False)
    assert list(tmp_path.iterdir()) == []
