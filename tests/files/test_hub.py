"""Addresses elsewhere, and results onto the Hub: against a stand-in of its API, by its own client."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bslora_convert import (
    Recipe,
    batch,
    compress,
    expand,
    expand_library,
    inspect,
    load_compact,
    load_lora,
    push,
    verify_library,
)
from bslora_convert.cli import main
from bslora_convert.errors import InputError, OutputError, RecipeError
from bslora_convert.files import remote
from bslora_convert.files.hub import MOST, commits
from bslora_convert.files.remote import fetched
from bslora_convert.files.store import is_url
from tests.conftest import FIXTURES
from tests.hub import Hub, hub
from tests.planting import random_products, write_lora

TINY = FIXTURES / "tiny"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, with an empty cache of the Hub's client and a token."""
    with hub() as (held, address):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
        fetched.cache_clear()
        yield held
        fetched.cache_clear()


def holding(directory: Path, above: str = "") -> dict[str, bytes]:
    return {
        above + path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "address", ["hf://org/name", "hf:/org/name", Path("hf://org/name"), "s3://bucket/x", "file:///tmp/x"]
)
def test_urls_are_known_also_when_they_were_taken_for_paths(address: Any) -> None:
    assert is_url(address)
    assert not is_url(f"./{address}")
    assert not is_url("C:/x")


def test_every_verb_that_reads_reads_the_hub(here: Hub, tmp_path: Path) -> None:
    here.repos["org/lora"] = holding(TINY / "gsm8k") | {"weights.gguf": b"not wanted"}
    record = compress("hf://org/lora", tmp_path / "compact", Recipe(transform="none", budget=0.5))
    assert record["source"]["sha256"] == compress(TINY / "gsm8k", tmp_path / "same", Recipe(transform="none", budget=0.5))[
        "source"
    ]["sha256"]  # fmt: skip
    here.repos["org/compact"] = holding(tmp_path / "compact", "sub/")
    address = f"hf://org/compact@{here.revision('org/compact')}/sub"
    assert set(load_compact(address).form.modules) == set(load_lora("hf://org/lora").modules)
    assert expand(address, tmp_path / "again", engine="vllm")["modules"] == record["source"]["modules"]
    assert inspect("hf://org/lora")["kind"] == "lora"
    done = CliRunner().invoke(main, ["expand", "hf://org/compact/sub", str(tmp_path / "cli"), "--json"])
    assert done.exit_code == 0, done.stderr
    for words in (
        ["inspect", "hf://org/lora"],
        ["compress", "hf://org/lora", str(tmp_path / "c2"), "--transform", "none"],
    ):
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.stderr
    assert not list((tmp_path / "hub-cache").rglob("*.gguf"))


def test_an_adapter_of_a_library_on_the_hub_is_read_by_its_name(here: Hub, tmp_path: Path) -> None:
    from tests.library.test_libraries import mixed

    for seed in range(2):
        write_lora(tmp_path / "in" / f"t{seed}", mixed(seed))
    batch(tmp_path / "in", tmp_path / "out", Recipe(transform="none", budget=0.5), workers=0)
    assert push(tmp_path / "out", "org/library")["files"] > 6
    assert not any(name.startswith(".batch") for name in here.repos["org/library"])
    found = load_compact("hf://org/library::t0")
    assert found.path.name == "t0" and not (found.path.parent / "t1").exists()
    assert set(found.form.modules) == set(load_compact(tmp_path / "out" / "t0").form.modules)


@pytest.mark.parametrize("kind", ["hub", "memory"])
def test_a_whole_library_of_a_url_is_expanded_and_measured(here: Hub, tmp_path: Path, kind: str) -> None:
    """As it lies on the Hub once it was pushed: without what batch keeps for itself."""
    from tests.library.test_libraries import BASE, PROMPTS, QUICK, mixed

    for name, seed in (("team/a", 0), ("b", 1)):
        write_lora(tmp_path / "in" / name, mixed(seed), base_model_name_or_path="fixtures/tiny/base")
    batch(tmp_path / "in", tmp_path / "out", Recipe(transform="none", budget=0.5), workers=0)
    if kind == "hub":
        push(tmp_path / "out", "org/whole")
        address = f"hf://org/whole@{here.revision('org/whole')}"
    else:
        import fsspec

        address = "memory://whole/library"
        for name, data in holding(tmp_path / "out").items():
            if not name.startswith(".batch/"):
                fsspec.filesystem("memory").pipe(f"/whole/library/{name}", data)
    expand_library(tmp_path / "out", tmp_path / "expected", engine="vllm")
    done = CliRunner().invoke(main, ["expand", address, str(tmp_path / "served"), "--for", "vllm", "--json"])
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["library"], [row["id"] for row in said["rows"]]) == (address, ["b", "team/a"])
    for name in ("team/a", "b"):
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (tmp_path / "served" / name / file).read_bytes() == (
                tmp_path / "expected" / name / file
            ).read_bytes()
        record = json.loads((tmp_path / "served" / name / "expansion.json").read_text())
        assert record["source"]["path"] == f"{address}::{name}"
    assert str(tmp_path) not in json.dumps([row["source"] for row in said["rows"]])
    room = ["--gpu-gib", "2", "--base-gib", "1"]
    there, local = (
        CliRunner().invoke(main, ["capacity", place, *room, "--json"]) for place in (address, str(tmp_path / "out"))
    )
    assert there.exit_code == 0, there.stderr
    assert json.loads(there.stdout) == json.loads(local.stdout)
    following = f"expand {address} {'whole' if kind == 'hub' else 'library'}-served --for vllm"
    assert following in " ".join(CliRunner().invoke(main, ["capacity", address, *room]).output.split())
    missing = CliRunner().invoke(main, ["capacity", f"{address}/none", "--gpu-gib", "2", "--base-gib", "1"])
    assert missing.exit_code == 2 and "none: no manifest.jsonl" in missing.stderr
    words = [
        "verify",
        address,
        "--base-model",
        str(BASE),
        "--prompts",
        str(PROMPTS),
        "--limit",
        "3",
        "--max-new-tokens",
        "0",
    ]
    done = CliRunner().invoke(main, [*words, "--json"])
    assert done.exit_code == 0, done.stderr
    measured, beside = json.loads(done.stdout), verify_library(tmp_path / "out", prompts=PROMPTS, **QUICK)
    assert [(row["id"], row["kl"]) for row in measured["rows"]] == [(row["id"], row["kl"]) for row in beside["rows"]]
    for which in (address, f"{address}::b"):
        done = CliRunner().invoke(main, [*words[:1], which, *words[2:], "--save"])
        assert done.exit_code == 2
        assert "is elsewhere" in done.stderr


def test_a_library_on_the_hub_is_converted_from_there(here: Hub, tmp_path: Path) -> None:
    for name, source in (("one", "gsm8k"), ("team/two", "banking77")):
        here.repos.setdefault("org/loras", {}).update(holding(TINY / source, f"{name}/"))
    recipe = Recipe(transform="none", ranks=(2, 0, 0))
    summary = batch("hf://org/loras", tmp_path / "out", recipe, workers=0, report_html=False)
    assert summary["ok"] == 2
    record = json.loads((tmp_path / "out" / "team/two" / "fidelity.json").read_text())
    assert record["source"]["path"] == "hf://org/loras/team/two"
    assert batch("hf://org/loras", tmp_path / "out", recipe, workers=0, report_html=False)["skipped"] == 2


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("hf://org/none", "not there"),
        ("hf://org", "hf://org/name"),
        ("hf://org/lora/nothing/here", "no files of an adapter"),
        ("hf://org/lora/../x", "without .."),
        ("s3://key:secret@bucket/x", "credentials"),
        ("memory://nothing/here", "can't be fetched|no such place"),
        ("hf://org/lora::../x", "letters, digits"),
    ],
)
def test_addresses_that_lead_nowhere_are_named(here: Hub, address: str, words: str) -> None:
    here.repos["org/lora"] = holding(TINY / "gsm8k")
    with pytest.raises((InputError, RecipeError), match=words) as caught:
        load_lora(address)
    assert "secret" not in str(caught.value)


def test_any_store_of_fsspec(tmp_path: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for name, data in holding(TINY / "banking77").items():
        store.pipe(f"/bucket/a/{name}", data)
    assert load_lora("memory://bucket/a").modules.keys() == load_lora(TINY / "banking77").modules.keys()
    assert fetched("memory://bucket/a") is fetched("memory://bucket/a")
    assert load_lora((TINY / "banking77").absolute().as_uri()).modules


def test_a_result_is_pushed_as_it_lies_here(here: Hub, tmp_path: Path) -> None:
    compress(TINY / "gsm8k", tmp_path / "compact", Recipe(transform="none", budget=0.5), report_html=False)
    words = ["expand", str(tmp_path / "compact"), str(tmp_path / "lora"), "--push", "org/served"]
    dry = CliRunner().invoke(main, [*words, "--push-dry-run", "--json"])
    assert dry.exit_code == 0, dry.stderr
    assert here.repos == {}
    assert json.loads(dry.stdout)["push"]["dry_run"] is True
    done = CliRunner().invoke(main, [*words, "--overwrite"])
    assert done.exit_code == 0, done.stderr
    assert here.repos["org/served"] == holding(tmp_path / "lora")
    assert "to https://huggingface.co/org/served" in done.stdout
    assert here.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in done.stdout + done.stderr
    assert load_lora("hf://org/served").modules


def test_compress_and_batch_push_as_well(here: Hub, tmp_path: Path) -> None:
    words = ["--transform", "none", "--budget", "0.5"]
    compressing = ["compress", str(TINY / "gsm8k"), str(tmp_path / "c"), *words, "--push", "org/one"]
    done = CliRunner().invoke(main, compressing)
    assert done.exit_code == 0, done.stderr
    assert here.repos["org/one"] == holding(tmp_path / "c")
    write_lora(tmp_path / "in" / "team" / "a", random_products(layers=1, rank=2))
    write_lora(tmp_path / "in" / "b", random_products(layers=1, rank=2, seed=1))
    batching = ["batch", str(tmp_path / "in"), str(tmp_path / "out"), *words, "--workers", "0", "--push", "org/many"]
    for more in (["--dry-run"], ["--push-dry-run"]):
        assert CliRunner().invoke(main, [*batching, *more]).exit_code == 0
        assert "org/many" not in here.repos
    done = CliRunner().invoke(main, [*batching, "--json"])
    assert done.exit_code == 0, done.stderr
    held = {name for name in holding(tmp_path / "out") if not name.startswith(".batch/")}
    assert set(here.repos["org/many"]) == held
    assert {"team/a/README.md", "b/adapter_model.safetensors", "manifest.jsonl"} <= held
    assert json.loads(done.stdout)["push"]["files"] == len(held)
    assert load_compact("hf://org/many/team/a").form.modules


def test_a_library_takes_few_commits_and_no_adapter_is_parted(here: Hub, tmp_path: Path) -> None:
    place = tmp_path / "library"
    for number in range(45):
        (place / f"t{number:02d}").mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            (place / f"t{number:02d}" / name).write_text(f"{number} {name}")
    record = push(place, "org/many")
    assert (record["files"], len(record["commits"])) == (135, 2)
    for _, names in here.commits:
        assert len(names) <= MOST
        assert len(names) % 3 == 0
    assert here.repos["org/many"] == holding(place)


def test_a_directory_of_more_files_than_a_commit_takes() -> None:
    parts = list(commits([f"a/{number:03d}" for number in range(250)] + ["b/0"]))
    assert [len(part) for part in parts] == [100, 100, 51]


def test_what_fails_on_the_way_leaves_the_result_here(here: Hub, tmp_path: Path) -> None:
    write_lora(tmp_path / "lora", random_products(layers=1, rank=2))
    compress(tmp_path / "lora", tmp_path / "compact", Recipe(transform="none", budget=0.9), report_html=False)
    here.fails = True
    with pytest.raises(OutputError, match="written here, but not pushed"):
        push(tmp_path / "compact", "org/full")
    done = CliRunner().invoke(main, ["expand", str(tmp_path / "compact"), str(tmp_path / "out"), "--push", "org/full"])
    assert done.exit_code == 2
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_bad_places_are_refused_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for words, said in (
        (["--push", "name"], "--push is 'name': org/name is expected"),
        (["--push", "../x/y"], "org/name is expected"),
        (["--push", "org/name"], "nobody is logged in"),
        (["--push-dry-run"], "give that as well"),
    ):
        done = CliRunner().invoke(main, ["expand", str(tmp_path), str(tmp_path / "out"), *words])
        assert done.exit_code == 2
        assert said in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_client_is_imported_only_when_it_is_asked_for() -> None:
    code = "import sys; import bslora_convert.cli, bslora_convert.files.remote; assert 'huggingface_hub' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
    assert remote.WANTED


def test_a_store_writes_nothing_outside_of_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A listing is a stranger's: a name that leads up is refused before anything of it is fetched."""
    import fsspec

    asked: list[str] = []

    class Store:
        def find(self, top: str) -> list[str]:
            return [f"{top}/../../outside.json"]

        def get_file(self, name: str, path: str) -> None:
            asked.append(path)

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (Store(), "bucket/hostile"))
    with pytest.raises(InputError, match="leads out of it"):
        fetched("memory://bucket/hostile")
    assert not asked
