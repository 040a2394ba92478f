"""Adapters of transformers 4, one module an expert: what PEFT drops of their expansion is said, and the compact form keeps it."""

from pathlib import Path

from bslora_convert import Recipe, compress, expand
from tests.arriving.making import answers, apart, base, loaded
from tests.planting import random_products, write_lora

EXACT = Recipe(transform="none", budget=1.0, dtype="float32")
PROJECTIONS = {"gate_proj": (16, 32), "up_proj": (16, 32), "down_proj": (32, 16)}
EXPERTS = {f"mlp.experts.{number}.{name}": shape for number in range(4) for name, shape in PROJECTIONS.items()}
BESIDE = {"mlp.shared_experts.gate_proj": (16, 32)}


def written(place: Path, *, shared: bool) -> Path:
    """An adapter of the second layer, the first is dense."""
    products = random_products(layers=2, rank=4, kinds={**EXPERTS, **BESIDE, "self_attn.o_proj": (32, 32)})
    kept = {name: p for name, p in products.items() if ".layers.1." in name and (shared or "shared" not in name)}
    return write_lora(place, kept)


def test_shared_experts_are_dropped_by_peft_and_kept_here(tmp_path: Path) -> None:
    compress(written(tmp_path / "lora", shared=True), tmp_path / "compact", EXACT, report_html=False)
    record = expand(tmp_path / "compact", tmp_path / "expanded")
    (said,) = (note for note in record["notes"] if note.startswith("ATTENTION"))
    assert "drops 1 updates" in said and "model.layers.1.mlp.shared_experts.gate_proj" in said
    ours, theirs = (answers(loaded(tmp_path / kind, "deepseek_v3")) for kind in ("compact", "expanded"))
    assert apart(theirs, ours) > 1e-3  # as soon as PEFT drops nothing, the note can go
    compress(written(tmp_path / "without", shared=False), tmp_path / "rest", EXACT, report_html=False)
    assert apart(answers(loaded(tmp_path / "rest", "deepseek_v3")), theirs) < 1e-5
    assert apart(answers(base("deepseek_v3")), ours) > 0.05


def test_nothing_is_said_where_nothing_is_dropped(tmp_path: Path) -> None:
    compress(written(tmp_path / "lora", shared=False), tmp_path / "compact", EXACT, report_html=False)
    record = expand(tmp_path / "compact", tmp_path / "expanded")
    assert not [note for note in record["notes"] if note.startswith("ATTENTION")]
    both = [answers(loaded(tmp_path / kind, "deepseek_v3")) for kind in ("compact", "expanded")]
    assert apart(*both) < 1e-5
