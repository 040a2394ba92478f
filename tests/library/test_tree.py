"""A library's adapters behind links: each once, no loop, and nothing left out without a word."""

import json
from pathlib import Path

import fsspec
import pytest
from click.testing import CliRunner

from bslora_convert import Recipe, batch
from bslora_convert.cli import main
from bslora_convert.errors import InputError
from bslora_convert.library.discovery import discover
from bslora_convert.library.tree import Tree
from tests.planting import random_products, write_lora

PLAIN = Recipe(transform="none", budget=0.5)


def lora(place: Path, seed: int = 0) -> Path:
    return write_lora(place, random_products(layers=1, seed=seed))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A library with links of every kind."""
    library, store = tmp_path / "library", tmp_path / "store"
    lora(library / "plain")
    lora(library / "plain" / "reference", 1)
    lora(library / "plain" / "checkpoint-5", 2)
    for number, name in enumerate(("a", "deep/b")):
        lora(store / name, 3 + number)
    (library / "linked").symlink_to("../store", target_is_directory=True)
    (library / "once-more").symlink_to("../store/a", target_is_directory=True)
    (library / "within").symlink_to("plain", target_is_directory=True)
    (library / "loop").symlink_to("..", target_is_directory=True)
    (store / "back").symlink_to("../library", target_is_directory=True)
    (library / "nothing").symlink_to("../gone", target_is_directory=True)
    (library / "weights-alone").mkdir()
    (library / "weights-alone" / "adapter_model.safetensors").write_bytes(b"x")
    lora(library / ".hidden" / "x")
    return library


def test_every_adapter_is_found_once_and_the_rest_is_named(root: Path) -> None:
    tree = Tree(root)
    assert sorted(path.relative_to(root).as_posix() for path in tree.adapters) == ["linked/a", "linked/deep/b", "plain"]
    assert {note.partition(": ")[0]: note.partition(": ")[2].partition(":")[0] for note in tree.notes} == {
        "plain/reference": "inside of the adapter plain, left out",
        "plain/checkpoint-5": "inside of the adapter plain, left out",
        "linked": "a link out of the library, followed",
        "once-more": "a link to linked/a, left out",
        "within": "a link to plain, left out",
        "loop": "a link to the library itself, or above what is in it, left out",
        "linked/back": "a link to the library itself, or above what is in it, left out",
        "nothing": "a link to nothing",
        "weights-alone": "adapter_model.safetensors without adapter_config.json, left out",
    }


def test_links_to_where_nobody_looks_are_followed(tmp_path: Path) -> None:
    lora(tmp_path / ".store" / "one")
    lora(tmp_path / "two")
    lora(tmp_path / "two" / "checkpoint-5", 1)
    lora(tmp_path / "..2026" / "four", 2)
    (tmp_path / "..data").symlink_to("..2026")  # as Kubernetes mounts configurations
    for name, target in (("one", ".store/one"), ("three", "two/checkpoint-5"), ("four", "..data/four")):
        (tmp_path / name).symlink_to(target)
    tree = Tree(tmp_path)
    assert sorted(path.name for path in tree.adapters) == ["four", "one", "three", "two"]


def test_a_link_found_before_what_holds_it_is_taken_once(tmp_path: Path) -> None:
    lora(tmp_path / "store" / "a")
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "a").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "library" / "b").symlink_to(tmp_path / "store")
    tree = Tree(tmp_path / "library")
    assert [path.name for path in tree.adapters] == ["a"]
    assert any("above what is in it" in note for note in tree.notes)


def test_a_batch_says_what_it_left_out(root: Path, tmp_path: Path) -> None:
    summary = batch(root, tmp_path / "out", PLAIN, workers=0, report_html=False)
    assert (summary.ok, len(summary.notes)) == (3, 9)
    assert sorted(row["id"] for row in map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())) == [
        "linked/a", "linked/deep/b", "plain",
    ]  # fmt: skip
    assert "weights-alone" in (tmp_path / "out" / "report.html").read_text()
    dry = CliRunner().invoke(main, ["batch", str(root), str(tmp_path / "dry"), "--dry-run"])
    assert "9 left out, or linked from elsewhere: " in dry.output


def test_an_adapter_at_the_top_names_what_is_below_it(tmp_path: Path) -> None:
    lora(tmp_path / "several")
    lora(tmp_path / "several" / "reference", 1)
    found = discover(str(tmp_path / "several"))
    assert [item.id for item in found.items] == ["several"]
    assert found.notes == ["reference: inside of the adapter several, left out"]


def test_a_store_is_told_of_too() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("tree/a/adapter_config.json", "tree/a/adapter_model.safetensors", "tree/a/b/adapter_config.json",
                 "tree/c/adapter_config.json"):  # fmt: skip
        memory.pipe(f"/{name}", b"{}")
    found = discover("memory://tree")
    assert [item.id for item in found.items] == ["a"]
    assert found.notes == [
        "a/b: inside of the adapter a, left out",
        "c: adapter_config.json without weights, left out",
    ]


def test_nothing_but_what_was_left_out_is_an_error_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(InputError, match=r"holds no adapter.*x: adapter_model\.safetensors without"):
        discover(str(tmp_path))
