"""What adapters of one pipeline have in common: found without a seed, stored once, read by every reader, joined later."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import bslora_convert.peft  # noqa: F401  registers the tuner
from bslora_convert import Recipe, batch, compress, expand, load_compact, load_into, load_lora
from bslora_convert.bslora.common import commons_in, found_from, named_in, read_common
from bslora_convert.errors import InputError
from bslora_convert.files.remote import fetched
from tests.conftest import FIXTURES
from tests.planting import UNKNOWN, drawn_lora, forget_draws, siblings

TINY = FIXTURES / "tiny"
RECIPE = Recipe(transform="none", max_error=0.2, init="auto")
COUNT = 6


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library of siblings and a stranger, converted."""
    root = tmp_path_factory.mktemp("common")
    siblings(root / "in", TINY / "gsm8k", COUNT)
    shutil.copytree(TINY / "banking77", root / "in" / "stranger")
    batch(root / "in", root / "out", RECIPE, workers=0, report_html=False)
    return root


@pytest.fixture
def unread() -> None:
    """A process that has read nothing yet."""
    forget_draws()


def config_of(place: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((place / "adapter_config.json").read_text())
    return found


def test_siblings_share_one_file_and_take_fewer_bytes(made: Path, tmp_path: Path) -> None:
    out = made / "out"
    (common,) = commons_in(out)
    alone, together = 0, common.stat().st_size
    for number in range(COUNT):
        record = json.loads((out / f"t{number}" / "fidelity.json").read_text())
        assert record["weight"]["relative_error"] <= 0.2
        found = record["initialisation"]
        assert (found["generator"], found["file"], found["modules"]) == (
            "adapters",
            common.name,
            record["source"]["modules"],
        )
        assert "seed" not in found or found["seed"] is None
        assert named_in(config_of(out / f"t{number}")) == common.name
        together += record["compact"]["bytes"]
        if number < 2:
            one = compress(made / "in" / f"t{number}", tmp_path / str(number), RECIPE, report_html=False)
            assert one.initialisation is None
            alone += one.compact.bytes * COUNT // 2
    assert together < alone
    summary = json.loads((out / "summary.json").read_text())
    assert summary["bytes_in_common"] == common.stat().st_size
    assert summary["bytes_after"] > together
    assert named_in(config_of(out / "stranger")) is None


@pytest.mark.usefixtures("unread")
def test_every_reader_finds_the_file(made: Path, tmp_path: Path) -> None:
    tenant = made / "out" / "t1"
    form = load_compact(tenant).form
    expand(tenant, tmp_path / "lora")
    back = load_lora(tmp_path / "lora")
    name = next(iter(form.modules))
    delta, found = form.delta(name), back.modules[name].factors()
    assert torch.allclose(delta.b @ delta.a, found.b @ found.a, atol=1e-6)
    base = AutoModelForCausalLM.from_pretrained(TINY / "base").eval()
    ids = torch.arange(2, 18)[None]
    with torch.no_grad():
        with load_into(base, tenant):
            wanted = base(input_ids=ids).logits
        for resident in ("codes", "floats"):
            forget_draws()
            tuned = PeftModel.from_pretrained(
                AutoModelForCausalLM.from_pretrained(TINY / "base"), str(tenant), resident=resident
            ).eval()
            assert torch.allclose(tuned(input_ids=ids).logits, wanted, atol=1e-4)


@pytest.mark.usefixtures("unread")
def test_a_url_brings_the_file_along(made: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(made / "out"), "/library", recursive=True)
    place = fetched("memory://library", "t2")
    assert load_compact(place).initial is not None
    memory.rm("/library", recursive=True)


@pytest.mark.usefixtures("unread")
def test_a_tenant_alone_says_what_it_lacks(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "out" / "t0", tmp_path / "deep" / "t0")
    (common,) = commons_in(made / "out")
    with pytest.raises(InputError, match=f"against {common.name}"):
        load_compact(tmp_path / "deep" / "t0")
    shutil.copy(common, tmp_path)
    assert found_from(tmp_path / "deep" / "t0", common.name) == tmp_path / common.name
    assert load_compact(tmp_path / "deep" / "t0").initial is not None


@pytest.mark.usefixtures("unread")
def test_a_damaged_file_is_refused(made: Path, tmp_path: Path) -> None:
    (common,) = commons_in(made / "out")
    content = bytearray(common.read_bytes())
    content[-1] ^= 1
    (tmp_path / common.name).write_bytes(content)
    with pytest.raises(InputError, match="not what its name says"):
        read_common(tmp_path / common.name)
    with pytest.raises(InputError, match="lies beside the library"):
        found_from(tmp_path, "../../etc/passwd")


def test_later_adapters_join_and_nothing_else_is_written_anew(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "library")
    source, out = tmp_path / "library" / "in", tmp_path / "library" / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    drawn_lora(TINY / "gsm8k", source / "late", UNKNOWN, trained=77)
    shutil.rmtree(source / "t3")
    batch(source, out, RECIPE, workers=0, report_html=False)
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    assert {path: after[path] for path in before} == before
    (common,) = commons_in(out)
    assert named_in(config_of(out / "late")) == common.name


def test_a_seed_that_is_known_needs_no_file(tmp_path: Path) -> None:
    for number in range(3):
        drawn_lora(TINY / "gsm8k", tmp_path / "in" / f"t{number}", 3407, trained=number)
    batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert commons_in(tmp_path / "out") == []
    for number in range(3):
        said = config_of(tmp_path / "out" / f"t{number}")["initialisation"]
        assert isinstance(said, dict) and said["seed"] == 3407


def test_two_siblings_do_not_pay_for_a_file_and_none_asks_for_none(tmp_path: Path) -> None:
    for number in range(3):
        drawn_lora(TINY / "gsm8k", tmp_path / "in" / f"t{number}", UNKNOWN, trained=number)
    batch(tmp_path / "in", tmp_path / "none", RECIPE.but(init="none"), workers=0, report_html=False)
    assert commons_in(tmp_path / "none") == []
    shutil.rmtree(tmp_path / "in" / "t2")
    batch(tmp_path / "in", tmp_path / "two", RECIPE, workers=0, report_html=False)
    assert commons_in(tmp_path / "two") == []
