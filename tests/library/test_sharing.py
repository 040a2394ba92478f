"""`batch --share-across`: planted bases are found, unrelated adapters stay as they are, and what is there is never touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from bslora_convert import Recipe, batch, compress, expand, inspect, load_compact, load_lora
from bslora_convert.behaviour.adapter import read_adapter
from bslora_convert.bslora.storage import CONFIG_NAME, WEIGHTS_NAME
from bslora_convert.cli import main
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.fit.joint import ROUNDINGS, rounding
from bslora_convert.library import joint
from bslora_convert.library.journal import NAME, read_journal
from bslora_convert.library.manifest import read_manifest
from bslora_convert.library.settings import NAME as SETTINGS
from bslora_convert.lora.adapter import CONFIG_NAME as LORA_CONFIG
from bslora_convert.modules.factors import Factors, Shape
from tests.conftest import FIXTURES
from tests.library.making import tree
from tests.planting import write_lora

KINDS: dict[str, Shape] = {"self_attn.q_proj": (192, 192), "self_attn.v_proj": (96, 192), "mlp.up_proj": (384, 192)}
LAYERS, RANK, COUNT = 2, 6, 8
SHAPES = {f"model.layers.{layer}.{kind}": shape for layer in range(LAYERS) for kind, shape in KINDS.items()}
WIDTH = sum(map(sum, SHAPES.values()))
WHOLE = Recipe(transform="none", ranks=(RANK, 0, 0))


def planted(
    seed: int, family: int | None = 0, noise: float = 0.0, shapes: Mapping[str, Shape] = SHAPES
) -> dict[str, Factors]:
    """An update U C V of every module, U and V those of its family; without one they are its own."""
    own = torch.Generator().manual_seed(seed)
    common = own if family is None else torch.Generator().manual_seed(1000 + family)
    products = {}
    for name, (out, across) in shapes.items():
        left, right = torch.randn(out, RANK, generator=common), torch.randn(RANK, across, generator=common)
        b, a = left @ torch.randn(RANK, RANK, generator=own), right
        if noise:
            b = b + noise * torch.randn(out, RANK, generator=own)
            a = a + noise * torch.randn(RANK, across, generator=own)
        products[name] = Factors(b, a)
    return products


def write(root: Path, names: str, family: int | None, seed: int = 0, **options: Any) -> None:
    for number, name in enumerate(names):
        noise = options.get("noise", 0.0)
        products = planted(100 * seed + number + 1, family, noise, options.get("shapes", SHAPES))
        write_lora(root / name, products, **options.get("config", {}))


def run(library: Path, out: Path, recipe: Recipe = WHOLE, share: bool = True, **options: Any) -> dict[str, Any]:
    return batch(library, out, recipe, workers=0, report_html=False, share_across=share, **options)


def errors(out: Path) -> dict[str, float]:
    return {row["id"]: row["relative_error"] for row in read_manifest(out)}


def dense_error(source: Path, compact: str) -> float:
    form = load_compact(compact).form
    lost = energy = 0.0
    for name, module in load_lora(source).modules.items():
        exact, kept = module.factors(), form.delta(name)
        whole = exact.b.double() @ exact.a.double()
        lost += float((whole - kept.b.double() @ kept.a.double()).square().sum())
        energy += float(whole.square().sum())
    return float((lost / energy) ** 0.5)


def file_bytes(out: Path) -> int:
    return sum(len(content) for content in tree(out).values())


def allowed(separate: float, dtype: torch.dtype = torch.float32) -> float:
    """An adapter may have the error that it has alone, or that of the dtype's rounding."""
    return max(separate, (ROUNDINGS * rounding(dtype)) ** 0.5) * (1 + 1e-6)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight adapters of one family, written as `in`; converted separately in `separate` and jointly in `joint`."""
    root = tmp_path_factory.mktemp("sharing")
    write(root / "in", "abcdefgh", family=0)
    run(root / "in", root / "separate", share=False)
    run(root / "in", root / "joint")
    return root


def test_planted_bases_give_the_factor_of_the_shapes(library: Path) -> None:
    numbers = sum(
        tensor.numel() for path in (library / "joint").rglob("*.safetensors") for tensor in load_file(path).values()
    )
    separate = COUNT * RANK * WIDTH
    joint = RANK * WIDTH + COUNT * len(SHAPES) * RANK**2
    assert numbers == joint
    assert separate / joint == pytest.approx(7.17, abs=0.01)
    sizes = [
        sum(path.stat().st_size for path in (library / name).rglob("*.safetensors")) for name in ("separate", "joint")
    ]
    assert sizes[0] / sizes[1] > 0.85 * separate / joint  # headers
    assert file_bytes(library / "joint") < file_bytes(library / "separate")
    before, after = errors(library / "separate"), errors(library / "joint")
    assert all(after[name] <= allowed(before[name]) for name in before)


def test_records_are_of_what_is_on_disk(library: Path) -> None:
    out = library / "joint"
    summary = json.loads((out / "summary.json").read_text())
    (group,) = summary["sharing"]["groups"]
    (cluster,) = group["shared"]
    assert (group["adapters"], cluster["adapters"], cluster["modules"]) == (COUNT, list("abcdefgh"), {"both": 6})
    (file,) = (out / ".bases").iterdir()
    assert (file.stem, file.stat().st_size) == (cluster["bases"], cluster["bytes"]["bases"])
    own = sum((out / name / kept).stat().st_size for name in "abcdefgh" for kept in (WEIGHTS_NAME, CONFIG_NAME))
    assert group["bytes"]["adapters"] == own
    assert summary["bytes_after"] == file.stat().st_size + sum(row["bytes"] for row in read_manifest(out))
    assert "8 of 8 adapters are on one set of bases" in group["words"]
    assert group["words"] in (out / "report.html").read_text()
    for row in read_manifest(out):
        record = json.loads((out / row["id"] / "fidelity.json").read_text())
        assert record["weight"]["relative_error"] == row["relative_error"]
        assert record["compact"]["bytes"] == row["bytes"] == (out / row["id"] / WEIGHTS_NAME).stat().st_size
        assert record["compact"]["parameters"] == row["parameters"] == len(SHAPES) * RANK**2
        assert record["compact"]["bases"] == {"sha256": file.stem, "modules": 6, "parameters": RANK * WIDTH}
        assert "takes bases of 6 modules from its library" in (out / row["id"] / "README.md").read_text()


def test_every_verb_takes_an_adapter_of_a_library(library: Path, tmp_path: Path) -> None:
    address = f"{library / 'joint'}::c"
    done = expand(address, tmp_path / "lora")
    assert done["ranks"] == {"min": RANK, "max": RANK} and done["relative_error"] == 0
    adapter = read_adapter(address)
    assert (adapter.kind, adapter.path) == ("bslora", library / "joint" / "c")
    found = inspect(address)
    assert (found["kind"], found["parameters"], found["bases"]["modules"]) == ("bslora", len(SHAPES) * RANK**2, 6)
    assert found["bytes_by_part"] == {"local": found["parameters"] * 4, "intra": 0, "inter": 0}
    shown = CliRunner().invoke(main, ["inspect", address, "--json"])
    assert json.loads(shown.stdout) == found
    assert CliRunner().invoke(main, ["inspect", address]).exit_code == 0
    done = CliRunner().invoke(main, ["expand", address, str(tmp_path / "again")])
    assert (done.exit_code, (tmp_path / "again" / LORA_CONFIG).is_file()) == (0, True)
    bad = CliRunner().invoke(main, ["inspect", f"{library / 'joint'}::../in/c"])
    assert (bad.exit_code, "letters, digits" in bad.stderr) == (2, True)


def test_the_same_library_gives_the_same_tree_and_a_rerun_changes_nothing(library: Path, tmp_path: Path) -> None:
    run(library / "in", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(library / "joint")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if ".bases" in path.parts}
    again = run(library / "in", tmp_path / "out")
    assert (again["ok"], again["skipped"]) == (0, COUNT)
    assert tree(tmp_path / "out") == tree(library / "joint")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    assert again["sharing"] == json.loads((library / "joint" / "summary.json").read_text())["sharing"]
    plain = run(library / "in", tmp_path / "out", share=False)
    assert (plain["skipped"], plain["sharing"]) == (COUNT, again["sharing"])


def test_unrelated_adapters_stay_as_they_are(tmp_path: Path) -> None:
    write(tmp_path / "in", "abcde", family=None)
    for number, recipe in enumerate((WHOLE, Recipe(transform="none", budget=0.4))):
        separate, joint = tmp_path / f"separate{number}", tmp_path / f"joint{number}"
        run(tmp_path / "in", separate, recipe, share=False)
        summary = run(tmp_path / "in", joint, recipe)
        assert tree(joint) == tree(separate)
        (group,) = summary["sharing"]["groups"]
        assert (group["shared"], group["separate"]) == ([], list("abcde"))
        assert "share nothing" in group["words"]


def test_families_are_found_among_strangers_and_other_bases(tmp_path: Path) -> None:
    write(tmp_path / "in", "adgj", family=0)
    write(tmp_path / "in", "beh", family=1, seed=1)
    write(tmp_path / "in", "cf", family=None, seed=2)
    write(tmp_path / "in", "xyz", family=0, seed=3, config={"base_model_name_or_path": "another"})
    write(tmp_path / "in", "m", family=0, seed=4, shapes={name: SHAPES[name] for name in list(SHAPES)[:3]})
    run(tmp_path / "in", tmp_path / "separate", share=False)
    summary = run(tmp_path / "in", tmp_path / "joint")
    found = {
        group["base_model"] + str(group["modules"]): (
            sorted("".join(cluster["adapters"]) for cluster in group["shared"]),
            "".join(group["separate"]),
        )
        for group in summary["sharing"]["groups"]
    }
    assert found == {"a-base-model6": (["adgj", "beh"], "cf"), "another6": (["xyz"], ""), "a-base-model3": ([], "m")}
    assert len({cluster["bases"] for group in summary["sharing"]["groups"] for cluster in group["shared"]}) == 3
    one, two = tree(tmp_path / "separate"), tree(tmp_path / "joint")
    assert {name for name in one if two[name] == one[name]} >= {name for name in one if name[0] in "cfm"}


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        (Recipe(transform="none", budget=0.5), torch.float32),
        (Recipe(transform="none", budget=0.5), torch.bfloat16),
        (Recipe(transform="ke", ranks=(2, 1, 2)), torch.float32),
    ],
)
def test_no_adapter_is_worse_and_no_library_larger(tmp_path: Path, recipe: Recipe, dtype: torch.dtype) -> None:
    for family, (names, noise) in enumerate((("abcd", 0.03), ("efg", 0.3), ("hi", 1.0))):
        write(tmp_path / "in", names, family, seed=family, noise=noise, config={"dtype": dtype})
    run(tmp_path / "in", tmp_path / "separate", recipe, share=False)
    summary = run(tmp_path / "in", tmp_path / "joint", recipe)
    before, after = errors(tmp_path / "separate"), errors(tmp_path / "joint")
    assert all(after[name] <= allowed(before[name], dtype) for name in before)
    assert after["a"] == pytest.approx(dense_error(tmp_path / "in" / "a", f"{tmp_path / 'joint'}::a"), rel=1e-4)
    assert "abcd" in ["".join(cluster["adapters"]) for cluster in summary["sharing"]["groups"][0]["shared"]]
    assert file_bytes(tmp_path / "joint") <= file_bytes(tmp_path / "separate")


def test_adding_an_adapter_rewrites_no_other_and_deleting_one_breaks_no_other(library: Path, tmp_path: Path) -> None:
    shutil.copytree(library / "in", tmp_path / "in")
    shutil.copytree(library / "joint", tmp_path / "out")
    before = tree(tmp_path / "out")
    write(tmp_path / "in", "n", family=0, seed=7)
    write(tmp_path / "in", "o", family=None, seed=8)
    run(tmp_path / "in", tmp_path / "other", share=False)
    separate = errors(tmp_path / "other")
    # The sources of the copy lie elsewhere, so it is known by the hashes of their files alone.
    summary = run(tmp_path / "in", tmp_path / "out")
    assert (summary["skipped"], summary["ok"]) == (COUNT, 2)
    after = tree(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"n", "o"}
    (group,) = summary["sharing"]["groups"]
    (cluster,) = group["shared"]
    assert ("".join(cluster["adapters"]), group["separate"]) == ("abcdefghn", ["o"])
    joint = errors(tmp_path / "out")
    assert all(joint[name] <= allowed(separate[name]) for name in "no")
    kept = {name: load_compact(f"{tmp_path / 'out'}::{name}").form for name in "bn"}
    shutil.rmtree(tmp_path / "out" / "a")
    shutil.rmtree(tmp_path / "in" / "a")
    for name, form in kept.items():
        again = load_compact(f"{tmp_path / 'out'}::{name}").form
        assert all(torch.equal(x, y) for x, y in zip(form.tensors(), again.tensors(), strict=True))
    assert run(tmp_path / "in", tmp_path / "out")["sharing"]["bytes"]["unused"] == 0
    for name in "bcdefghn":
        shutil.rmtree(tmp_path / "out" / name)
        shutil.rmtree(tmp_path / "in" / name)
    (file,) = (tmp_path / "out" / ".bases").iterdir()
    left = run(tmp_path / "in", tmp_path / "out")["sharing"]
    assert left["unused"] == [f".bases/{file.name}"]
    assert left["bytes"]["unused"] == file.stat().st_size


def test_a_killed_run_and_a_rerun_give_the_tree_of_a_whole_one(library: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "bslora_convert", "batch", str(library / "in"), str(tmp_path / "out"), "--workers", "0",
        "--transform", "none", "--ranks", f"{RANK},0,0", "--no-report-html", "--share-across",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FIXTURES.parent)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / ".batch" / NAME).exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    on_bases = [name for name in "abcdefgh" if "bases" in (tmp_path / "out" / name / CONFIG_NAME).read_text()]
    assert len(on_bases) < COUNT
    run(library / "in", tmp_path / "out")
    assert tree(tmp_path / "out") == tree(library / "joint")


@pytest.mark.parametrize("lost", ["markers", "journal", "both", "directory", "bases before the journal"])
def test_wherever_it_was_killed_the_tree_is_the_same(library: Path, tmp_path: Path, lost: str) -> None:
    """States that a kill leaves, made from the finished ones: some adapters still separate, records not yet written."""
    out = tmp_path / "out"
    shutil.copytree(library / "joint", out)
    separate = "abcdefgh" if lost in ("journal", "bases before the journal") else "cg"
    for name in separate:
        shutil.rmtree(out / name)
        if lost != "directory":
            shutil.copytree(library / "separate" / name, out / name)
    if lost in ("markers", "both"):
        for marker in (out / ".batch").glob("*.json"):
            if marker.name not in (NAME, SETTINGS):
                marker.unlink()
    if lost in ("journal", "bases before the journal"):
        (out / ".batch" / NAME).unlink()
    if lost == "journal":
        shutil.rmtree(out / ".bases")
    run(library / "in", out)
    assert tree(out) == tree(library / "joint")


def test_what_does_not_go_is_said(library: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="share_across with shard 1/2"):
        run(library / "in", tmp_path / "out", shard=(1, 2))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    tuned = Recipe(transform="none", budget=0.5, base_model="b", finetune=str(tmp_path / "rows.jsonl"))
    with pytest.raises(RecipeError, match="share_across with finetune"):
        run(library / "in", tmp_path / "out", tuned)
    shutil.copytree(library / "joint", tmp_path / "out")
    (file,) = (tmp_path / "out" / ".bases").iterdir()
    file.unlink()
    with pytest.raises(InputError, match=r"needs \.bases/"):
        load_compact(f"{tmp_path / 'out'}::a")
    anew = run(library / "in", tmp_path / "out", resume=False)
    assert anew["sharing"]["left_out"] == {}
    assert tree(tmp_path / "out") == tree(library / "joint")
    (tmp_path / "out" / ".batch" / NAME).write_text('{"adapters": {"a": {"key": 1}, "b": 7}}')
    assert read_journal(tmp_path / "out") == {}
    (tmp_path / "out" / ".batch" / NAME).write_text("[]")
    assert read_journal(tmp_path / "out") == {}
    reasons = run(library / "in", tmp_path / "out")["sharing"]["left_out"]
    assert set(reasons) == set("abcdefgh")
    assert "no run decided on" in reasons["b"]


def test_adapters_whose_bases_are_gone_are_converted_again(library: Path, tmp_path: Path) -> None:
    shutil.copytree(library / "joint", tmp_path / "out")
    for file in (tmp_path / "out" / ".bases").iterdir():
        file.unlink()
    assert run(library / "in", tmp_path / "out")["ok"] == COUNT
    assert tree(tmp_path / "out") == tree(library / "joint")


def test_one_damaged_record_is_one_adapter_left_out(library: Path, tmp_path: Path) -> None:
    shutil.copytree(library / "separate", tmp_path / "out")
    (tmp_path / "out" / "c" / "fidelity.json").write_text("{}")
    told = run(library / "in", tmp_path / "out")["sharing"]
    assert set(told["left_out"]) == {"c"}
    assert sorted(told["groups"][0]["shared"][0]["adapters"]) == [*"abdefgh"]


def test_an_adapter_that_does_nothing_keeps_no_other_from_sharing(tmp_path: Path) -> None:
    write(tmp_path / "in", "abcd", family=0)
    idle = {name: Factors(torch.zeros_like(f.b), f.a) for name, f in planted(9).items()}
    write_lora(tmp_path / "in" / "idle", idle)
    lame = planted(10)
    first = next(iter(lame))
    lame[first] = Factors(torch.zeros_like(lame[first].b), lame[first].a)
    write_lora(tmp_path / "in" / "lame", lame)
    (group,) = run(tmp_path / "in", tmp_path / "out")["sharing"]["groups"]
    assert group["shared"][0]["adapters"] == ["a", "b", "c", "d", "lame"]
    assert group["separate"] == ["idle"]


def test_what_was_converted_without_a_fit_or_has_changed_stays_separate(library: Path, tmp_path: Path) -> None:
    shutil.copytree(library / "in", tmp_path / "in")
    compress(library / "in" / "a", tmp_path / "ke", Recipe(transform="ke", ranks=(2, 1, 2), shared_size=96))
    expand(tmp_path / "ke", tmp_path / "in" / "official", format="official")
    run(tmp_path / "in", tmp_path / "out", share=False)
    record = tmp_path / "out" / "c" / "fidelity.json"
    value = json.loads(record.read_text())
    record.write_text(json.dumps({**value, "source": {**value["source"], "sha256": "0"}}))
    before = tree(tmp_path / "out")
    sharing = run(tmp_path / "in", tmp_path / "out")["sharing"]
    assert sharing["left_out"] == {"c": "c: its source is not what it was converted from any more"}
    after = tree(tmp_path / "out")
    for name in ("c", "official"):
        assert {path: after[path] for path in before if path.startswith(f"{name}/")} == {
            path: content for path, content in before.items() if path.startswith(f"{name}/")
        }
    together = [cluster["adapters"] for group in sharing["groups"] for cluster in group["shared"]]
    assert together == [list("abdefgh")]
    assert [group["separate"] for group in sharing["groups"]] == [["official"]]
    assert run(tmp_path / "in", tmp_path / "out")["sharing"] == sharing


def test_those_after_the_first_ones_go_on_their_bases_wherever_they_come_from(
    library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joint, "TOGETHER", 3)
    memory = fsspec.filesystem("memory")
    for name in "eh":
        for path in (library / "in" / name).iterdir():
            memory.pipe(f"/sharing/{name}/{path.name}", path.read_bytes())
    uris = {name: f"memory://sharing/{name}" if name in "eh" else str(library / "in" / name) for name in "abcdefgh"}
    rows = [json.dumps({"id": f"tenant/{name}", "uri": uri}) for name, uri in uris.items()]
    (tmp_path / "list.jsonl").write_text("\n".join(rows))
    (group,) = run(tmp_path / "list.jsonl", tmp_path / "out")["sharing"]["groups"]
    (cluster,) = group["shared"]
    assert cluster["adapters"] == [f"tenant/{name}" for name in "abcdefgh"]
    separate, after = errors(library / "separate"), errors(tmp_path / "out")
    assert all(after[f"tenant/{name}"] <= allowed(separate[name]) for name in separate)
    assert load_compact(f"{tmp_path / 'out'}::tenant/h").bases_parameters == RANK * WIDTH
