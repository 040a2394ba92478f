"""What stands beside an adapter: what prepares inputs travels, what changes answers travels and is said, the rest is named."""

import hashlib
import os
import shutil
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
    (note,) = copy_travelling(source, tmp_path / "place")
    assert "a link leads out" in note and note.endswith("1_Pooling/config.json, tokenizer.json")


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def in_the_hubs_cache(source: Path, cache: Path, hops: int) -> Path:
    """A repository as the Hub's client keeps it: a snapshot of links to blobs, which newer clients share by a second hop."""
    repository = cache / "models--org--name"
    snapshot, blobs, shared = repository / "snapshots" / COMMIT, repository / "blobs", cache / "blobs"
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(source)
        for folder in (link.parent, blobs, shared):
            folder.mkdir(parents=True, exist_ok=True)
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        if hops == 2:
            shutil.copy(path, shared / blob.name)
            blob.unlink(missing_ok=True)
            blob.symlink_to(f"../../blobs/{blob.name}")
        else:
            shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.mark.parametrize("hops", [1, 2])
def test_links_of_the_hubs_cache_are_the_files(
    lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hops: int
) -> None:
    snapshot = in_the_hubs_cache(lora, tmp_path / "cache", hops)
    (snapshot / "tokenizer_config.json").symlink_to(tmp_path / "cache" / "models--org--name" / "refs" / "main")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "by-path").symlink_to(snapshot)
    for number, source in enumerate((snapshot, tmp_path / "by-path", "hf://org/name", f"hf://org/name@{COMMIT}")):
        place = tmp_path / f"out{number}"
        record = compress(source, place, Recipe(transform="none"), report_html=False)
        assert record["source"]["path"] == str(source)
        for name in (*SILENT, *SAID):
            assert (place / name).read_text() == f"content of {name}", name
            assert not (place / name).is_symlink()
        assert not (place / "tokenizer_config.json").exists()
        assert any("tokenizer_config.json" in note and "link" in note for note in record["notes"])


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
