"""What stands beside an adapter: what prepares inputs travels, what changes answers travels and is said, the rest is named."""

from pathlib import Path

import fsspec
import pytest

from bslora_convert import Recipe, batch, compress, expand
from bslora_convert.files.travel import CHANGING_ANSWERS, TRAVELLING, copy_travelling, travelling
from tests.planting import random_products, write_lora

SILENT = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "tokenizer.json", "normalizer.json",
    "additional_chat_templates/tool_use.jinja", "tekken.json", "bpe.codes", "qwen.tiktoken", "tokenizer.model.v3",
    "source.spm", "chat_template.jinja",
)  # fmt: skip
SAID = (
    "non_lora_trainables.bin", "value_head.safetensors", "modules.json", "1_Pooling/config.json",
    "config_sentence_transformers.json", "sentence_bert_config.json", "mm_projector.bin", "v_head.bin",
)  # fmt: skip
LEFT = (
    "optimizer.pt",
    "training_args.bin",
    "trainer_state.json",
    "README.md",
    "checkpoint-5/model.safetensors",
    ".git/HEAD",
)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    source = write_lora(tmp_path / "lora", random_products(layers=1))
    for name in (*SILENT, *SAID, *LEFT):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"content of {name}")
    return source


def test_all_that_matters_is_there_after_compress_and_expand(lora: Path, tmp_path: Path) -> None:
    record = compress(lora, tmp_path / "compact", Recipe(transform="none"), report_html=False)
    expanded = expand(tmp_path / "compact", tmp_path / "expanded")
    for place, notes in ((tmp_path / "compact", record["notes"]), (tmp_path / "expanded", expanded["notes"])):
        for name in (*SILENT, *SAID):
            assert (place / name).read_text() == f"content of {name}", name
        for name in (*LEFT[:3], *LEFT[4:]):
            assert not (place / name).exists(), name
        (said,) = (note for note in notes if note.startswith("ATTENTION"))
        assert "1_Pooling/config.json" in said
        assert not any("tokenizer.json" in note for note in notes)
    assert set(record["files"]) >= {*SILENT, *SAID}


def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1))
    (lora / "router.safetensors").write_text("x")
    (lora / "experts").mkdir()
    notes = compress(lora, tmp_path / "out", Recipe(transform="none"), report_html=False)["notes"]
    assert notes == ["not known, so not copied from the source's directory: experts/, router.safetensors"]


def test_links_that_lead_away_do_not_travel(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    source = tmp_path / "source"
    (source / "1_Pooling").mkdir(parents=True)
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    (source / "1_Pooling" / "config.json").symlink_to(tmp_path / "secret")
    (source / "vocab.txt").write_text("x")
    (source / "vocab.json").symlink_to(source / "vocab.txt")
    assert travelling(source) == ["vocab.json", "vocab.txt"]
    (tmp_path / "place").mkdir()
    copy_travelling(source, tmp_path / "place")
    assert sorted(path.name for path in (tmp_path / "place").rglob("*")) == ["vocab.json", "vocab.txt"]


def test_it_travels_from_a_store_too(lora: Path, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for path in lora.rglob("*"):
        if path.is_file():
            memory.pipe(f"/travel/one/{path.relative_to(lora).as_posix()}", path.read_bytes())
    summary = batch("memory://travel", tmp_path / "out", Recipe(transform="none"), workers=0, report_html=False)
    assert summary["ok"] == 1
    for name in (*SILENT, *SAID):
        assert (tmp_path / "out" / "one" / name).is_file(), name


def test_no_pattern_reaches_over_a_folder() -> None:
    assert all(pattern.count("/") <= 1 for pattern in (*TRAVELLING, *CHANGING_ANSWERS))
