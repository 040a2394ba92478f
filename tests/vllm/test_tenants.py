"""What the plugin answers to names, damage, other bases and a full cache, without vLLM: it is split so that it can be asked."""

import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bslora_convert import Recipe, compress, load_compact, load_lora
from bslora_convert.bslora.layout import Entry
from bslora_convert.errors import InputError, RecipeError, Refused
from bslora_convert.vllm import names, snapshots, tenants
from bslora_convert.vllm.base import check_name, check_shapes, shapes_of
from bslora_convert.vllm.resolver import Declined, Resolver
from bslora_convert.vllm.settings import GIB, Settings, told_by
from bslora_convert.vllm.snapshots import Snapshots, digest_of
from bslora_convert.vllm.tenants import Tenants
from tests.conftest import FIXTURES
from tests.planting import random_products, write_lora

TINY = FIXTURES / "tiny"
BASE = str(TINY / "base")
SERVED = "fixtures/tiny/base"


@pytest.fixture
def library(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "library")
    return tmp_path / "library"


@pytest.fixture
def opened(library: Path, tmp_path: Path) -> Tenants:
    return Tenants(Settings(library, tmp_path / "cache"))


def resolver(opened: Tenants) -> Resolver:
    return Resolver(opened, logging.getLogger("test"))


# ---------------------------------------------------------------------------------------------- names


def test_a_tenant_is_the_lora_of_its_compact_adapter(opened: Tenants, library: Path) -> None:
    found = opened.find("team/math", BASE)
    assert found is not None
    assert (found.written, found.bytes) == (True, (library / "team/math/adapter_model.safetensors").stat().st_size)
    form, lora = load_compact(library / "team/math").form, load_lora(found.path)
    for name, module in lora.modules.items():
        delta = form.delta(name)
        torch.testing.assert_close(module.factors().b @ module.factors().a, delta.b @ delta.a, rtol=1e-5, atol=1e-5)
    config = json.loads((found.path / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == max(form.expanded_rank(name) for name in form.modules)
    assert isinstance(config["target_modules"], list)
    again = opened.find("team/math", BASE)
    assert again is not None
    assert (again.path, again.written) == (found.path, False)


HOSTILE = (
    "", "/etc/passwd", "../library/bank", "team/../bank", "..", ".", ".batch", "team/.hidden", "..\\bank", "bank\\", "bank\0",
    "\0", "bank/", "/bank", "team//math", "bank/adapter_config.json", "manifest.jsonl", "b" * 300, "bank\n", "bänk", "~", "$HOME",
    "bank ",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_no_other_name_leads_anywhere(opened: Tenants, name: str) -> None:
    assert opened.find(name, BASE) is None
    assert resolver(opened).answer(name, BASE) is None


def test_an_absolute_path_to_a_tenant_and_a_link_out_of_the_library_are_none(
    opened: Tenants, library: Path, tmp_path: Path
) -> None:
    shutil.copytree(library / "bank", tmp_path / "outside")
    (library / "linked").symlink_to(tmp_path / "outside")
    for name in (str(library / "bank"), "linked", "linked/..", "team"):
        assert opened.find(name, BASE) is None


@given(st.text(max_size=40))
def test_whatever_is_asked_for_lies_inside(made: Path, name: str) -> None:
    found = names.find(made, name)
    assert found is None or made.resolve() in found.parents


# ---------------------------------------------------------------------------------------------- damage


def cut(place: Path) -> None:
    weights = place / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])


def turned(place: Path) -> None:
    weights = place / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 0xFF
    weights.write_bytes(bytes(data))


def edited(**fields: Any) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        path = place / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def hollow(place: Path) -> None:
    (place / "adapter_model.safetensors").unlink()
    (place / "adapter_model.safetensors").mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut short": (cut, "truncated"),
    "one bit turned": (turned, "not the file that was written"),
    "no weights": (lambda place: (place / "adapter_model.safetensors").unlink(), "can't be read"),
    "weights are a directory": (hollow, "can't be read"),
    "no JSON": (lambda place: (place / "adapter_config.json").write_text("{"), "not valid JSON"),
    "a list": (lambda place: (place / "adapter_config.json").write_text("[]"), "no compact adapter"),
    "deep JSON": (lambda place: (place / "adapter_config.json").write_text("[" * 100_000), "not valid JSON"),
    "another version": (edited(format_version=99), "format_version is 99"),
    "another kind": (edited(peft_type="LORA"), "no compact adapter"),
    "a huge shape": (edited(modules={"a.0.q": {"shape": [1 << 23, 1 << 23], "rank": 1 << 20}}), "base model has no a.0.q"),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_with_its_reason_and_nothing_else_suffers(
    opened: Tenants, library: Path, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tenants, "PAUSE", 0)
    damage, words = DAMAGE[kind]
    damage(library / "bank")
    asked = resolver(opened)
    with pytest.raises((InputError, Refused), match=words):
        opened.find("bank", BASE)
    with pytest.raises(Declined, match=words) as said:
        asked.answer("bank", BASE)
    assert str(library) not in str(said.value)  # no path of the server leaves it
    assert words in caplog.text
    assert asked.answer("team/math", BASE) is not None
    assert asked.outcomes.counts == {"hit": 0, "loaded": 1, "refused": 1, "unknown": 0}


def test_whatever_goes_wrong_is_one_tenants_trouble(opened: Tenants, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tenants, "save_lora", full)
    with pytest.raises(Declined, match="No space left"):
        resolver(opened).answer("bank", BASE)
    assert [path.name for path in (opened.snapshots.place / "lora").iterdir()] == []


# ---------------------------------------------------------------------------------------------- who is a tenant


def test_the_manifest_says_who_is_a_tenant(library: Path, tmp_path: Path) -> None:
    opened = Tenants(Settings(library, tmp_path / "cache"))
    (library / "manifest.jsonl").unlink()
    assert opened.find("bank", BASE) is not None  # without one, what the directory holds
    rows = [{"id": "team/math", "status": "ok"}, {"id": "bank", "status": "failed", "message": "its weights are cut"}]
    manifest = library / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert opened.find("team/math", BASE) is not None
    with pytest.raises(Refused, match="its last conversion failed: its weights are cut"):
        opened.find("bank", BASE)
    manifest.write_text(json.dumps(rows[0]) + "\n")
    assert opened.find("bank", BASE) is None  # it has left, though its files are there
    manifest.write_text(json.dumps(rows[0]) + "\n" + json.dumps({**rows[1], "status": "ok"})[:9])
    assert opened.find("team/math", BASE) is not None  # a row is being written
    manifest.write_text("{\n" + json.dumps(rows[0]) + "\n")
    with pytest.raises(InputError, match="line 1 is damaged"):
        opened.find("team/math", BASE)


def test_no_place_stands_in_a_refusal(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {
        "id": "bank",
        "status": "failed",
        "message": "/home/trainer/secret dir/bank/adapter_model.safetensors: truncated",
    }
    (library / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(Declined) as said:
        resolver(Tenants(Settings(library, tmp_path / "cache"))).answer("bank", BASE)
    assert "/home" not in str(said.value) and "truncated" in str(said.value)
    (library / "manifest.jsonl").unlink()
    edited(base_model_name_or_path="/trainer/secret/llama")(library / "bank")
    (tmp_path / "link").symlink_to(library)
    monkeypatch.chdir(library)
    for place in (library, tmp_path / "link", Path()):
        with pytest.raises(Declined, match="for the base model llama, and base is served") as said:
            resolver(Tenants(Settings(place, tmp_path / "cache"))).answer("bank", BASE)
        assert "/trainer" not in str(said.value) and str(tmp_path) not in str(said.value)


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("vllm serve base", (None, None)),
        ("--max-lora-rank 16 --lora-target-modules q_proj v_proj --port 1", (16, {"q_proj", "v_proj"})),
        ("--max_lora_rank=32 --lora-target-modules qkv_proj", (32, {"qkv_proj"})),
        ("--max-lora-rank x --lora-target-modules", (None, None)),
    ],
)
def test_what_a_command_line_says(command: str, told: tuple[int | None, set[str] | None]) -> None:
    assert told_by(command.split()) == told


def test_what_the_server_would_apply_in_part_is_refused(library: Path, tmp_path: Path) -> None:
    whole = frozenset({"qkv_proj", "o_proj", "gate_proj", "down_proj"})  # q, k, v and up go with them
    assert Tenants(Settings(library, tmp_path / "cache", kinds=whole, rank=8)).find("bank", BASE) is not None
    for settings, words in (
        (
            Settings(library, tmp_path / "cache", kinds=frozenset({"q_proj"})),
            "it adapts down_proj, gate_proj, o_proj, up_proj",
        ),
        (Settings(library, tmp_path / "cache", rank=1), "expanded rank is 8, and the server's --max-lora-rank is 1"),
    ):
        with pytest.raises(Refused, match=words):
            Tenants(settings).find("bank", BASE)


# ---------------------------------------------------------------------------------------------- base


def test_another_base_by_name_is_refused_unless_it_is_an_alias(library: Path, tmp_path: Path) -> None:
    edited(base_model_name_or_path="org/other-model")(library / "bank")
    for number, (aliases, good) in enumerate(
        (
            ((), False),
            (("org/other-model",), True),
            (("somebody/Other_Model",), True),
            (("*",), True),
            (("x",), False),
            (("other",), False),
        )
    ):
        opened = Tenants(Settings(library, tmp_path / f"cache{number}", aliases=frozenset(aliases)))
        if good:
            assert opened.find("bank", BASE) is not None
        else:
            with pytest.raises(Refused, match=r"for the base model org/other-model.*BSLORA_BASE_ALIASES"):
                opened.find("bank", BASE)


@pytest.mark.parametrize(
    "said", [None, "org/Model", "org/model", "/models/model/", "model", "D:\\x\\Model", "D:\\x\\Model\\", "x/MODEL"]
)
def test_names_that_mean_the_served_base(said: str | None) -> None:
    check_name(said, "/srv/model", frozenset())


def test_another_base_by_shape_is_refused(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(), base_model_name_or_path=BASE)
    compress(lora, tmp_path / "library" / "t", Recipe(transform="none", budget=0.5), report_html=False)
    opened = Tenants(Settings(tmp_path / "library", tmp_path / "cache"))
    with pytest.raises(Refused, match="x 256 in the base model and 64 x 128 in the adapter"):
        opened.find("t", BASE)
    assert opened.find("t", "a-model-that-is-not-here/base") is not None  # names alone decide


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("model.layers.0.self_attn.q_proj", (8, 4), None),
        (
            "language_model.model.layers.0.self_attn.q_proj",
            (8, 4),
            None,
        ),  # an older beginning, beside a tower's layer 0
        ("model.layers.0.self_attn.q_proj", (4, 8), None),  # transformers' Conv1D keeps (in, out)
        ("model.layers.0.self_attn.q_proj", (8, 5), "8 x 4 in the base model and 8 x 5"),
        ("model.layers.1.self_attn.q_proj", (8, 4), "has no model.layers.1"),
        ("model.layers.0.mlp.experts.3.up_proj", (8, 4), None),  # stacked there
        ("lm_head", (8, 4), None),  # tied there
    ],
)
def test_names_and_shapes_of_a_base(name: str, shape: tuple[int, int], words: str | None) -> None:
    base = {
        "model.layers.0.self_attn.q_proj": (8, 4), "vision.layers.0.self_attn.q_proj": (6, 6), "model.embed_tokens": (9, 4),
    }  # fmt: skip
    modules = {name: Entry(shape, 2)}
    check_shapes(modules, {})
    if words is None:
        check_shapes(modules, base)
    else:
        with pytest.raises(Refused, match=words):
            check_shapes(modules, base)


def test_shapes_are_those_of_the_bases_files(tmp_path: Path) -> None:
    shapes = shapes_of(BASE)
    assert shapes["model.layers.0.self_attn.q_proj"] == (128, 128)
    assert shapes_of(str(tmp_path)) == shapes_of("no/such-model") == {}
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    assert shapes_of(str(tmp_path)) == {}


# ---------------------------------------------------------------------------------------------- snapshots


def test_what_was_handed_out_outlives_the_library(opened: Tenants, library: Path) -> None:
    found = opened.find("bank", BASE)
    assert found is not None
    before = {path.name: path.read_bytes() for path in found.path.iterdir()}
    shutil.rmtree(library / "bank")
    assert opened.find("bank", BASE) is None
    assert {path.name: path.read_bytes() for path in found.path.iterdir()} == before


def test_an_updated_tenant_gets_another_path(opened: Tenants, library: Path) -> None:
    first, other = opened.find("bank", BASE), opened.find("team/math", BASE)
    shutil.rmtree(library / "bank")
    shutil.copytree(library / "team/math", library / "bank")
    second = opened.find("bank", BASE)
    assert first and other and second
    assert second.path == other.path != first.path  # one copy of equal content, and no old prefix cache
    assert first.path.is_dir()


def test_a_tenant_that_is_being_replaced_is_waited_for(
    opened: Tenants, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (library / "bank").rename(library / ".bank.old-1")
    monkeypatch.setattr(tenants.time, "sleep", lambda _: (library / ".bank.old-1").rename(library / "bank"))
    assert opened.find("bank", BASE) is not None


def test_at_its_bound_the_cache_refuses_and_keeps_what_it_has(library: Path, tmp_path: Path) -> None:
    roomy = Tenants(Settings(library, tmp_path / "roomy"))
    kept = roomy.find("bank", BASE)
    assert kept is not None
    size = snapshots.size_of(kept.path)
    assert roomy.snapshots.bytes == size
    tight = Tenants(Settings(library, tmp_path / "tight", cache_bytes=size + 10))
    first = tight.find("bank", BASE)
    assert first is not None
    with pytest.raises(Refused, match="raise BSLORA_CACHE_GIB"):
        tight.find("team/math", BASE)
    with pytest.raises(Declined, match="raise BSLORA_CACHE_GIB"):
        resolver(tight).answer("team/math", BASE)
    again = tight.find("bank", BASE)
    assert again is not None
    assert (again.path, again.written) == (first.path, False)
    assert [path.name for path in (tmp_path / "tight" / "lora").iterdir()] == [first.path.name]


def test_a_new_server_finds_what_an_earlier_one_wrote_and_tidies_up(library: Path, tmp_path: Path) -> None:
    first = Tenants(Settings(library, tmp_path / "cache"))
    found = first.find("bank", BASE)
    assert found is not None
    stale = tmp_path / "cache" / "lora" / ".partial-1-ab"
    stale.mkdir()
    beside = Tenants(Settings(library, tmp_path / "cache", cache_bytes=1))  # another server lives: nothing is removed
    assert stale.is_dir()
    assert found.path.is_dir()
    for server in (first, beside):
        server.snapshots.close()
    second = Tenants(Settings(library, tmp_path / "cache"))
    assert not stale.exists()
    again = second.find("bank", BASE)
    assert again is not None
    assert not again.written
    second.snapshots.close()
    Snapshots(tmp_path / "cache", 1).close()
    assert not found.path.exists()


def test_many_at_once_write_once(tmp_path: Path) -> None:
    cache = Snapshots(tmp_path / "cache", GIB)
    written = []

    def write(out: Path) -> None:
        written.append(out)
        (out / "file").write_text("x")

    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(cache.get(digest_of("a"), write)[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written) == 1
    assert set(found) == {tmp_path / "cache" / "lora" / digest_of("a")}


def test_parts_of_a_digest_do_not_run_into_each_other() -> None:
    assert digest_of("ab", "c") != digest_of("a", "bc") != digest_of("abc")


# ---------------------------------------------------------------------------------------------- settings


def test_settings_come_from_the_environment(library: Path, tmp_path: Path) -> None:
    assert Settings.of({}) is None
    given = Settings.of({
        "BSLORA_LIBRARY": str(library), "BSLORA_CACHE": str(tmp_path / "c"), "BSLORA_CACHE_GIB": "0.5",
        "BSLORA_BASE_ALIASES": "org/a, b,,",
    })  # fmt: skip
    assert given == Settings(library, tmp_path / "c", GIB // 2, frozenset({"org/a", "b"}))
    for wrong, words in (
        ({"BSLORA_LIBRARY": str(tmp_path / "none")}, "BSLORA_LIBRARY is"),
        ({"BSLORA_LIBRARY": str(library), "BSLORA_CACHE_GIB": "much"}, "BSLORA_CACHE_GIB is 'much'"),
        ({"BSLORA_LIBRARY": str(library), "BSLORA_CACHE_GIB": "-1"}, "BSLORA_CACHE_GIB is -1"),
        ({"BSLORA_LIBRARY": str(library), "BSLORA_CACHE": str(library / "c")}, "outside of the library"),
    ):
        with pytest.raises(RecipeError, match=words):
            Settings.of(wrong)


def test_the_entry_point_does_nothing_without_a_library_and_imports_no_vllm() -> None:
    code = (
        "import sys; from bslora_convert.vllm.plugin import register; register(); "
        "assert not {'vllm', 'transformers', 'peft', 'sklearn', 'matplotlib', 'scipy'} & set(sys.modules), sys.modules"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BSLORA")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
    wrong = {**environment, "BSLORA_LIBRARY": "/no/such/place"}
    done = subprocess.run([sys.executable, "-c", code], check=False, env=wrong, capture_output=True, text=True)
    assert done.returncode == 1
    assert "BSLORA_LIBRARY is /no/such/place" in done.stderr
    assert "Traceback" not in done.stderr
