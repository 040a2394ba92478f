"""Addresses elsewhere, and results onto the Hub: against a stand-in of its API, by its own client."""

import hashlib
import json
import os
import shutil
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
    verify,
    verify_library,
)
from bslora_convert.cli import main
from bslora_convert.errors import InputError, OutputError, RecipeError
from bslora_convert.files import remote
from bslora_convert.files.hub import MOST, commits, upload
from bslora_convert.files.remote import fetched
from bslora_convert.files.scrub import without_places
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
            expected = (tmp_path / "expected" / name / file).read_bytes()
            if kind == "hub":  # where a base that is a path here is named by its last part
                expected = expected.replace(b"fixtures/tiny/base", b"base")
            assert (tmp_path / "served" / name / file).read_bytes() == expected
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
    if kind == "hub":  # nobody knows any more where the sources lie
        assert done.exit_code == 1
        assert all("not there from here" in row["message"] for row in json.loads(done.stdout)["rows"])
        return
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


# What must not leave this machine: where things lay, whose prompts were measured.
def stays_here(contents: dict[str, bytes], *places: Path) -> None:
    for name, data in contents.items():
        for place in places:
            assert str(place).encode() not in data, f"{name} holds {place}"
            assert json.dumps(str(place))[1:-1].encode() not in data, name


def test_an_adapter_is_pushed_without_where_it_lay(here: Hub, tmp_path: Path) -> None:
    lora = Path(shutil.copytree(TINY / "gsm8k", tmp_path / "customers" / "acme"))
    shutil.copytree(TINY / "base", tmp_path / "disk" / "my-base")
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "disk/my-base")})
    )
    rows = shutil.copy(TINY / "gsm8k-heldout.jsonl", tmp_path / "secret-rows.jsonl")
    compact = tmp_path / "results" / "acme"
    compress(lora, compact, Recipe(transform="none", bytes=0.5))
    verify(compact, prompts=rows, limit=3, max_new_tokens=4, save=True)
    expand(compact, tmp_path / "results" / "served", engine="vllm")
    dry = CliRunner().invoke(main, ["push", str(compact), "org/acme", "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.stderr
    assert here.repos == {}
    said = json.loads(dry.stdout)
    assert said["dry_run"] and "report.html" not in said["names"] and "verify.json" not in said["names"]
    done = CliRunner().invoke(main, ["push", str(compact), "org/acme"])
    assert done.exit_code == 0, done.stderr
    assert "to https://huggingface.co/org/acme" in done.stdout
    assert here.tokens == {"Bearer hf_secret"}
    assert "hf_secret" not in done.stdout + done.stderr
    pushed = here.repos["org/acme"]
    assert sorted(pushed) == said["names"]
    stays_here(pushed, tmp_path, FIXTURES.parent)
    prompt = json.loads(Path(rows).read_text().splitlines()[0])
    assert not any(
        str(text).encode() in data for text in prompt.values() for data in pushed.values() if len(str(text)) > 20
    )
    card = pushed["README.md"].decode()
    assert "# acme, compact" in card and "my-base" not in card.partition("```python")[2].partition("```")[0]
    assert "pip install 'bslora-convert[base]'" in card and "model.generate" in card
    record = json.loads(pushed["fidelity.json"])
    assert record["source"]["path"] == "acme" and record["functional"]["retention"] > 0.5
    there = load_compact("hf://org/acme")
    assert (there.integrity, there.config["base_model_name_or_path"]) == ("as written", "my-base")
    for name, known in record["files"].items():  # its record is of what was uploaded
        assert known == {"bytes": len(pushed[name]), "sha256": hashlib.sha256(pushed[name]).hexdigest()}
    assert set(record["files"]) == set(pushed) - {"fidelity.json"}
    push(tmp_path / "results" / "served", "org/served")
    stays_here(here.repos["org/served"], tmp_path, FIXTURES.parent)
    assert load_lora("hf://org/served").modules
    push(compact, "org/all", reports=True)
    assert {"report.html", "verify.json"} <= set(here.repos["org/all"])


def test_what_is_no_result_stays_here(here: Hub, tmp_path: Path) -> None:
    compact = tmp_path / "results" / "acme"
    shutil.copytree(TINY / "gsm8k", tmp_path / "lora")
    (tmp_path / "lora" / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": f"{tmp_path}/clients/base", "x": "/a/b"})
    )
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    pattern = r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj"
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": pattern}))
    compress(tmp_path / "lora", compact, Recipe(transform="none", bytes=0.5))
    (compact / "id_rsa").write_text("secret")
    names = push(compact, "org/acme").names
    assert "id_rsa" not in names and "tokenizer_config.json" in names
    pushed = here.repos["org/acme"]
    assert json.loads(pushed["tokenizer_config.json"]) == {"name_or_path": "base", "x": "/a/b"}
    written = json.loads((compact / "adapter_config.json").read_text())
    assert json.loads(pushed["adapter_config.json"])["target_modules"] == written["target_modules"]
    weights = compact / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    with pytest.raises(InputError, match="not the file that was written"):
        push(compact, "org/damaged")
    (compact / "fidelity.json").write_text("{}")
    with pytest.raises(InputError, match="says nothing of source and files"):
        push(compact, "org/damaged")


def test_an_expanded_library_is_pushed_as_its_adapters(here: Hub, tmp_path: Path) -> None:
    for name in ("team/a", "b"):
        write_lora(tmp_path / "in" / name, random_products(layers=1, rank=2))
    batch(tmp_path / "in", tmp_path / "out", Recipe(transform="none", budget=0.5), workers=0)
    expand_library(tmp_path / "out", tmp_path / "served")
    (tmp_path / "served" / "prompts.jsonl").write_text("{}")
    push(tmp_path / "served", "org/served")
    pushed = here.repos["org/served"]
    assert {name.rpartition("/")[0] for name in pushed} == {"team/a", "b"}
    stays_here(pushed, tmp_path)
    assert load_lora("hf://org/served/team/a").modules


def test_a_library_is_pushed_with_its_tenants_alone(here: Hub, tmp_path: Path) -> None:
    write_lora(tmp_path / "in" / "team" / "a", random_products(layers=1, rank=2))
    write_lora(tmp_path / "in" / "b", random_products(layers=1, rank=2, seed=1))
    write_lora(tmp_path / "in" / "has-left", random_products(layers=1, rank=2, seed=2))
    recipe = Recipe(transform="none", budget=0.5)
    batch(tmp_path / "in", tmp_path / "out", recipe, workers=0)
    shutil.rmtree(tmp_path / "in" / "has-left")
    summary = batch(tmp_path / "in", tmp_path / "out", recipe, workers=0)
    assert summary.left_over == ["has-left"]
    done = CliRunner().invoke(main, ["push", str(tmp_path / "out"), "org/many", "--json"])
    assert done.exit_code == 0, done.stderr
    pushed = here.repos["org/many"]
    assert {"team/a/README.md", "b/adapter_model.safetensors", "manifest.jsonl", "summary.json", "README.md"} <= set(
        pushed
    )
    assert not any(name.startswith((".batch", "has-left", "report.html")) for name in pushed)
    stays_here(pushed, tmp_path)
    rows = [json.loads(line) for line in pushed["manifest.jsonl"].splitlines()]
    assert [(row["id"], row["uri"]) for row in rows] == [("b", "b"), ("team/a", "team/a")]
    card = pushed["README.md"].decode()
    assert "BSLORA_LIBRARY=hf://org/many" in card and "| [team/a](./team/a) |" in card and "--max-lora-rank 8" in card
    assert load_compact("hf://org/many/team/a").form.modules
    assert len(expand_library("hf://org/many", tmp_path / "again").rows) == 2


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"path": "/home/me/x/lora"}, {"path": "lora"}),
        ({"path": "../x/lora"}, {"path": "lora"}),
        ({"uri": "hf://org/name"}, {"uri": "hf://org/name"}),
        ({"base_model": "org/model"}, {"base_model": "org/model"}),
        ({"base_model": "D:\\x\\model"}, {"base_model": "model"}),
        ({"uri": "file:///srv/x/lora"}, {"uri": "lora"}),
        ({"target": r"model\.layers\.\d+\.(q_proj|k_proj)"}, {"target": r"model\.layers\.\d+\.(q_proj|k_proj)"}),
        ({"notes": ["C:\\x\\a.json and \\\\server\\a\\b, /data too"]}, {"notes": ["a.json and b, data too"]}),
        ({"notes": ["/srv/a/b.json: can't be read, see /metrics or 1/2 of a/b"]},
         {"notes": ["b.json: can't be read, see metrics or 1/2 of a/b"]}),
        ({"modules": ["model.layers.0.q_proj"], "n": 3, "url": "https://x.org/a/b"},
         {"modules": ["model.layers.0.q_proj"], "n": 3, "url": "https://x.org/a/b"}),
    ],
)  # fmt: skip
def test_places_of_this_machine_become_names(value: Any, expected: Any) -> None:
    assert without_places(value) == expected


def test_a_library_takes_few_commits_and_no_adapter_is_parted(here: Hub, tmp_path: Path) -> None:
    place = tmp_path / "library"
    for number in range(45):
        (place / f"t{number:02d}").mkdir(parents=True)
        for name in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            (place / f"t{number:02d}" / name).write_text(f"{number} {name}")
    record = upload({path.relative_to(place).as_posix(): path for path in place.rglob("*.*")}, "org/many")
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
    with pytest.raises(OutputError, match="not pushed whole"):
        push(tmp_path / "compact", "org/full")
    done = CliRunner().invoke(main, ["push", str(tmp_path / "compact"), "org/full"])
    assert done.exit_code == 2
    assert (tmp_path / "compact" / "adapter_model.safetensors").is_file()


def test_bad_places_are_refused_before_anything_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    for words, said in (
        ([str(tmp_path), "name"], "the repository is 'name': org/name is expected"),
        ([str(tmp_path), "../x/y"], "org/name is expected"),
        ([str(tmp_path), "org/name"], "nobody is logged in"),
        ([str(tmp_path / "none"), "org/name"], "no such file or directory"),
        ([str(tmp_path), "org/name", "--dry-run"], "holds no result"),
    ):
        done = CliRunner().invoke(main, ["push", *words])
        assert done.exit_code == 2
        assert said in done.stderr


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
