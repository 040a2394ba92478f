"""`batch` on libraries with bad members, killed and split runs: always the tree of an uninterrupted one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest
import torch
from click.testing import CliRunner

from bslora_convert import Recipe, batch, compress, load_compact
from bslora_convert.bslora.storage import WEIGHTS_NAME
from bslora_convert.cli import main
from bslora_convert.errors import InputError, OutputError, RecipeError
from bslora_convert.library.discovery import discover
from bslora_convert.library.each import for_each
from bslora_convert.library.engines.local import run_local
from bslora_convert.library.items import Item, check_ids, safe_ids, shard_of
from bslora_convert.library.jobs import Job, marker_of
from bslora_convert.library.manifest import read_manifest
from bslora_convert.library.serving import serving
from bslora_convert.process import interrupt
from bslora_convert.process.progress import silent
from bslora_convert.verbs.batch import resume
from bslora_convert.verbs.capacity import capacity
from tests.conftest import FIXTURES
from tests.library.making import make_library, takes_an_interrupt_for_damage, tree
from tests.planting import random_products, write_lora
from tests.recipes import by_file

RECIPE = Recipe(transform="none", budget=0.5)
OPTIONS = ("--transform", "none", "--budget", "0.5", "--no-report-html")


def command(library: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "bslora_convert", "batch", str(library), str(out), *OPTIONS, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(FIXTURES.parent)}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, str]]]:
    root = tmp_path_factory.mktemp("library") / "in"
    return root, make_library(root, 50, layers=8)


@pytest.fixture(scope="module")
def whole(library: tuple[Path, dict[str, tuple[str, str]]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    batch(library[0], out, RECIPE, workers=0, report_html=False)
    return out


def test_every_good_one_is_converted_and_every_bad_one_has_its_reason(
    library: tuple[Path, dict[str, tuple[str, str]]], whole: Path
) -> None:
    root, bad = library
    rows = {row["id"]: row for row in read_manifest(whole)}
    assert len(rows) == 50
    for name, row in rows.items():
        if name in bad:
            assert (row["status"], bad[name][1] in row["message"]) == (bad[name][0], True), row
            assert not (whole / name).exists()
        else:
            assert row["status"] == "ok", row
            fidelity = json.loads((whole / name / "fidelity.json").read_text())
            assert fidelity["weight"]["relative_error"] == row["relative_error"]
            assert fidelity["source"]["path"] == row["uri"] == str(root / name)
            assert (whole / name / "adapter_model.safetensors").stat().st_size == row["bytes"]
    summary = json.loads((whole / "summary.json").read_text())
    assert (summary["items"], summary["ok"], summary["failed"], summary["refused"], summary["pending"]) == (
        50, 45, 4, 1, 0
    )  # fmt: skip
    assert summary["bytes_after"] == sum(row["bytes"] for row in rows.values() if row["status"] == "ok")
    assert set(summary["relative_error"]) == {"p50", "p95", "max"}
    page = (whole / "report.html").read_text()
    assert "DoRA" in page
    assert not list(whole.rglob(".*partial*"))


def test_one_of_them_is_what_compress_writes(
    library: tuple[Path, dict[str, tuple[str, str]]], whole: Path, tmp_path: Path
) -> None:
    name = "tenant-0/good-000"
    compress(library[0] / name, tmp_path / "alone", RECIPE, report_html=False, recorded_as=str(library[0] / name))
    for path in (tmp_path / "alone").iterdir():
        assert path.read_bytes() == (whole / name / path.name).read_bytes(), path.name


def test_a_rerun_does_nothing_and_changes_redo_what_changed(tmp_path: Path) -> None:
    make_library(tmp_path / "in", 10)
    first = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    again = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert (first["ok"], first["failed"]) == (9, 1)
    assert (again["ok"], again["skipped"], again["failed"]) == (0, 9, 1)
    write_lora(tmp_path / "in" / "tenant-0" / "good-000", random_products(layers=1, seed=77))
    (tmp_path / "out" / "tenant-1" / "good-001" / "adapter_model.safetensors").unlink()
    third = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert (third["ok"], third["skipped"]) == (2, 7)
    before = tree(tmp_path / "out")
    with pytest.raises(OutputError, match=r"--budget \(there 0.5, now 0.3\)"):
        batch(tmp_path / "in", tmp_path / "out", Recipe(transform="none", budget=0.3), workers=0, report_html=False)
    with pytest.raises(OutputError, match=r"--transform .*--resume"):  # options that were forgotten
        batch(tmp_path / "in", tmp_path / "out", workers=0, report_html=False)
    assert tree(tmp_path / "out") == before
    other = batch(
        tmp_path / "in", tmp_path / "out", Recipe(transform="none", budget=0.3), workers=0, report_html=False,
        overwrite=True,
    )  # fmt: skip
    assert other["ok"] == 9
    assert resume(tmp_path / "out", workers=0)["skipped"] == 9
    broken = tmp_path / "in" / "tenant-2" / "truncated-009"
    tried = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, resume=False, report_html=False, overwrite=True)
    assert tried["ok"] == 9
    write_lora(broken, random_products(layers=1, seed=5))
    assert batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)["ok"] == 1


def wait_for(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.01)


def count_done(out: Path) -> int:
    return len(list(out.glob("*/*/fidelity.json")))


def goes_on(library: Path, out: Path, whole: Path) -> Any:
    """Ends a stopped run in this process: the tree is that of a whole one."""
    summary = batch(library, out, RECIPE, workers=0, report_html=False)
    assert tree(out) == tree(whole)
    assert not list(out.rglob(".*partial*"))
    return summary


def test_a_killed_parent_costs_nothing(
    library: tuple[Path, dict[str, tuple[str, str]]], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(command(library[0], out, "--workers", "2"), env=environment(), stdout=subprocess.DEVNULL)
    wait_for(lambda: count_done(out) > 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "summary.json").exists()
    time.sleep(1.0)  # its workers see that it is gone
    summary = goes_on(library[0], out, whole)
    assert summary.is_failed  # the library holds bad adapters
    assert summary["skipped"] > 5
    assert summary["ok"] + summary["skipped"] == 45


def test_a_killed_worker_is_one_failed_item(
    library: tuple[Path, dict[str, tuple[str, str]]], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(library[0], out, "--workers", "2", "--json"),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    wait_for(lambda: count_done(out) > 5)
    workers = [child for child in psutil.Process(process.pid).children() if "spawn_main" in " ".join(child.cmdline())]
    workers[0].kill()
    summary = json.loads(process.communicate(timeout=200)[0])
    assert process.returncode == 1
    died = summary["errors"].get("WorkerDied", 0)
    assert died <= 1
    assert summary["ok"] in (45 - died, 45)  # it may have been at one of the bad ones
    assert summary["ok"] + summary["failed"] + summary["refused"] == 50
    goes_on(library[0], out, whole)


def heed() -> None:
    """A test run that was started in the background ignores interrupts, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_interrupt_leaves_whole_results_and_goes_on(
    library: tuple[Path, dict[str, tuple[str, str]]], whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for sign in (signal.SIGTERM, signal.SIGINT):
        before = count_done(out)
        process = subprocess.Popen(
            command(library[0], out, "--workers", "2"), env=environment(), stderr=subprocess.PIPE, preexec_fn=heed
        )
        wait_for(lambda before=before: count_done(out) > before + 5)
        process.send_signal(sign)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 130
        assert b"goes on from there" in stderr
        assert not list(out.rglob(".*partial*"))
    done = tree(out)
    assert done == {name: content for name, content in tree(whole).items() if name in done}
    goes_on(library[0], out, whole)


def test_a_worker_that_is_ended_calls_no_adapter_damaged(tmp_path: Path) -> None:
    job = Job(Item("a", str(tmp_path)), str(tmp_path), {}, {}, "", "")
    (result,) = run_local(takes_an_interrupt_for_damage, [job], 1)
    assert (result.error, result.final) == ("WorkerDied", False)


def test_what_batch_did_not_make_is_not_replaced(tmp_path: Path) -> None:
    write_lora(tmp_path / "in" / "llama", random_products(layers=1))
    write_lora(tmp_path / "other" / "alpaca", random_products(layers=1))
    batch(tmp_path / "other", tmp_path / "out", RECIPE, workers=0, report_html=False)
    (tmp_path / "out" / "llama").mkdir()
    (tmp_path / "out" / "llama" / "precious").write_text("mine")
    for _ in range(2):  # the first run leaves a marker, which must not make the place its own
        summary = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
        assert (summary["failed"], summary["errors"]) == (1, {"OutputError": 1})
        assert (tmp_path / "out" / "llama" / "precious").read_text() == "mine"


def test_an_output_is_empty_new_or_its_own(tmp_path: Path) -> None:
    write_lora(tmp_path / "in" / "a", random_products(layers=1))
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("manifest.jsonl", "report.html", "summary.json"):
        (docs / name).write_text('{"id": "a", "uri": "../in/a"}')
    before = {path.name: path.read_bytes() for path in docs.iterdir()}
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not made by `batch`"):
            batch(tmp_path / "in", docs, RECIPE, workers=0, overwrite=overwrite)
    with pytest.raises(InputError, match="holds the manifest"):
        batch(docs / "manifest.jsonl", docs, RECIPE, workers=0)
    assert {path.name: path.read_bytes() for path in docs.iterdir()} == before
    (tmp_path / "empty" / ".batch").mkdir(parents=True)  # a run that was ended before it began
    assert batch(tmp_path / "in", tmp_path / "empty", RECIPE, workers=0)["ok"] == 1


def test_a_run_goes_on_by_its_output_alone(tmp_path: Path) -> None:
    make_library(tmp_path / "in", 4, broken=False)
    out = str(tmp_path / "out")
    first = CliRunner().invoke(main, ["batch", str(tmp_path / "in"), out, *OPTIONS, "--workers", "0"])
    assert first.exit_code == 0, first.stderr
    before = tree(tmp_path / "out")
    lost = next(path for path in sorted((tmp_path / "out").rglob("adapter_model.safetensors")))
    lost.unlink()
    again = CliRunner().invoke(main, ["batch", out, "--resume", "--workers", "0", "--json"])
    assert (again.exit_code, json.loads(again.stdout)["skipped"]) == (0, 3)
    assert tree(tmp_path / "out") == before
    for words, said in (
        ((out,), "Missing argument 'OUT'"),
        ((out, "--resume", "--budget", "0.25"), "--budget with OUT alone"),
        ((str(tmp_path / "in"), "--resume"), "not made by `batch`"),
        ((str(tmp_path / "in"), out), "--transform (there none, now auto)"),
    ):
        refused = CliRunner().invoke(main, ["batch", *words, "--workers", "0"])
        assert (refused.exit_code, said in refused.stderr) == (2, True), refused.stderr
    assert tree(tmp_path / "out") == before


def test_a_result_that_was_changed_is_not_taken_for_done_nor_replaced(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_lora(tmp_path / "in" / name, random_products(layers=1, seed=ord(name)))
    batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    flipped, torn = (tmp_path / "out" / name / WEIGHTS_NAME for name in ("a", "b"))
    content = bytearray(flipped.read_bytes())
    content[-5] ^= 1
    flipped.write_bytes(content)
    torn.write_bytes(torn.read_bytes()[:100])  # nothing can be read of it, so nothing is lost with it
    summary = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    rows = {row["id"]: row for row in read_manifest(tmp_path / "out")}
    assert (summary["ok"], summary["failed"]) == (1, 1)
    assert "changed since it was written" in rows["a"]["message"]
    assert flipped.read_bytes() == content


def test_a_copy_that_was_killed_before_its_end_is_made_again(tmp_path: Path) -> None:
    for name in "ab":
        write_lora(tmp_path / "in" / name, random_products(layers=1))
    whole = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    before = tree(tmp_path / "out")
    marker = marker_of(tmp_path / "out", "b")
    row = json.loads(marker.read_text())
    marker.write_text(json.dumps({**row, "status": "copying", "final": False}))
    again = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert (whole["ok"], again["failed"]) == (2, 0)
    assert tree(tmp_path / "out").keys() == before.keys()
    assert (tmp_path / "out" / "b" / WEIGHTS_NAME).read_bytes() == (tmp_path / "out" / "a" / WEIGHTS_NAME).read_bytes()


def test_a_torn_manifest_is_named_and_the_last_row_counts(tmp_path: Path) -> None:
    write_lora(tmp_path / "in" / "a", random_products(layers=1))
    batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    manifest = tmp_path / "out" / "manifest.jsonl"
    text = manifest.read_text()
    manifest.write_text(text + json.dumps({**json.loads(text), "status": "skipped"}) + "\n")
    assert [row["status"] for row in read_manifest(tmp_path / "out")] == ["skipped"]
    manifest.write_text(text + text[: len(text) // 2])  # a row that is being written
    assert len(read_manifest(tmp_path / "out")) == 1
    manifest.write_text(text + text[: len(text) // 2] + "\n")
    with pytest.raises(InputError, match="line 2 is damaged"):
        read_manifest(tmp_path / "out")


def test_files_that_the_recipe_names_are_part_of_the_key(tmp_path: Path) -> None:
    write_lora(tmp_path / "in" / "a", random_products(layers=2))
    groups = tmp_path / "groups.json"
    recipe = Recipe(transform="ke", ranks=(1, 1, 1), groups=str(groups))
    groups.write_text("{")
    assert batch(tmp_path / "in", tmp_path / "out", recipe, workers=0, report_html=False)["failed"] == 1
    groups.write_text('{"up": ["*.up_proj"]}')
    assert batch(tmp_path / "in", tmp_path / "out", recipe, workers=0, report_html=False)["ok"] == 1
    groups.write_text('{"up": ["*.mlp.*"]}')
    with pytest.raises(OutputError, match="the content of groups"):
        batch(tmp_path / "in", tmp_path / "out", recipe, workers=0, report_html=False)
    assert batch(tmp_path / "in", tmp_path / "out", recipe, workers=0, report_html=False, overwrite=True)["ok"] == 1
    with pytest.raises(InputError, match="no such file"):
        batch(tmp_path / "in", tmp_path / "out", Recipe(base_model="b", finetune=str(tmp_path / "none.jsonl")))


def test_an_unreadable_adapter_is_one_failed_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bslora_convert.library import plan

    for name in ("a", "b"):
        write_lora(tmp_path / "in" / name, random_products(layers=1, seed=ord(name)))
    whole = plan.sha256

    def breaks(path: Path) -> str:
        if path.parent.name == "a":
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(plan, "sha256", breaks)
    summary = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert (summary["ok"], summary["errors"]) == (1, {"PermissionError": 1})
    monkeypatch.undo()
    again = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert (again["items"], again["ok"], again["skipped"]) == (2, 1, 1)


def test_two_shards_equal_one_run(tmp_path: Path) -> None:
    make_library(tmp_path / "in", 20, broken=False)
    batch(tmp_path / "in", tmp_path / "one", RECIPE, workers=0, report_html=False)
    first = batch(tmp_path / "in", tmp_path / "two", RECIPE, workers=0, shard=(1, 2), report_html=False)
    second = batch(tmp_path / "in", tmp_path / "two", RECIPE, workers=0, shard=(2, 2), report_html=False)
    assert (first["pending"], second["pending"]) == (10, 0)
    assert [done.is_failed for done in (first, second)] == [False, False]  # what another shard has to do is no failure
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    strip = {"seconds", "status"}
    one, two = (
        [{k: v for k, v in row.items() if k not in strip} for row in read_manifest(tmp_path / name)]
        for name in ("one", "two")
    )
    assert one == two


@pytest.mark.slow
def test_ray_gives_the_bytes_of_the_local_engine(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    make_library(tmp_path / "in", 10)
    batch(tmp_path / "in", tmp_path / "local", RECIPE, workers=0, report_html=False)
    done = subprocess.run(
        command(tmp_path / "in", tmp_path / "ray", "--engine", "ray", "--workers", "2", "--json"),
        env={**environment(), "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert json.loads(done.stdout)["ok"] == 9, done.stderr
    assert tree(tmp_path / "ray") == tree(tmp_path / "local")


def test_equal_adapters_are_converted_once(tmp_path: Path) -> None:
    for name in ("a", "b/c"):
        write_lora(tmp_path / "in" / name, random_products(layers=1))
    summary = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert (summary["ok"], summary["duplicates"]) == (2, 1)
    weights = [(tmp_path / "out" / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b/c")]
    assert weights[0] == weights[1]
    assert batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)["skipped"] == 2
    (tmp_path / "in" / "a" / "tokenizer_config.json").write_text('{"chat_template": "a"}')
    summary = batch(tmp_path / "in", tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert (summary["ok"], summary["skipped"]) == (1, 1)
    assert (tmp_path / "out" / "a" / "tokenizer_config.json").is_file()
    assert not (tmp_path / "out" / "b" / "c" / "tokenizer_config.json").exists()


def test_manifests_and_urls(tmp_path: Path) -> None:
    write_lora(tmp_path / "adapters" / "x", random_products(layers=1))
    (tmp_path / "list.jsonl").write_text(
        '{"id": "one", "uri": "adapters/x"}\n\n{"id": "two", "uri": "memory://lib/two"}\n'
    )
    (tmp_path / "list.csv").write_text("id,uri,revision\none,adapters/x,\n")
    memory = fsspec.filesystem("memory")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        memory.pipe(f"/lib/two/{name}", (tmp_path / "adapters" / "x" / name).read_bytes())
    assert [item.id for item in discover(str(tmp_path / "list.csv")).items] == ["one"]
    assert [item.id for item in discover("memory://lib").items] == ["two"]
    summary = batch(tmp_path / "list.jsonl", tmp_path / "out", RECIPE, workers=0, report_html=False)
    assert summary["ok"] == 2
    weights = [(tmp_path / "out" / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    assert json.loads((tmp_path / "out" / "two" / "fidelity.json").read_text())["source"]["path"] == "memory://lib/two"
    assert batch(tmp_path / "list.jsonl", tmp_path / "out", RECIPE, workers=0, report_html=False)["skipped"] == 2


def test_dry_runs_failures_and_limits(tmp_path: Path) -> None:
    make_library(tmp_path / "in", 20)
    found = batch(tmp_path / "in", tmp_path / "out", RECIPE, dry_run=True)
    assert (found["items"], found["to_convert"], len(found["bad"])) == (20, 18, 2)
    assert not (tmp_path / "out").exists()
    nan = write_lora(tmp_path / "nan" / "a", random_products(layers=1))
    write_lora(tmp_path / "nan" / "b", random_products(layers=1, seed=2))
    from tests.library.making import make_nan

    make_nan(nan)
    stopped = batch(tmp_path / "nan", tmp_path / "stopped", RECIPE, workers=0, fail_fast=True, report_html=False)
    assert (stopped["failed"], stopped["pending"]) == (1, 1)
    code = (
        CliRunner()
        .invoke(main, ["batch", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0", *OPTIONS])
        .exit_code
    )
    assert code == 1


def test_capacity_follows_each_engines_rule(tmp_path: Path) -> None:
    for number in range(3):
        write_lora(tmp_path / "in" / str(number), random_products(layers=2, rank=16, seed=number), dtype=torch.bfloat16)
    batch(tmp_path / "in", tmp_path / "out", Recipe(transform="none", ranks=(4, 0, 0)), workers=0, report_html=False)
    rows = read_manifest(tmp_path / "out")
    found = capacity(rows, 2.0, 1.0)
    width = rows[0]["settings"]["width"]
    assert found["slots"]["lora"] == {"rank": 16, "slot_rank": 16, "adapters": (1 << 30) // (16 * width * 2)}
    assert found["slots"]["compact"]["slot_rank"] == 8
    assert found["paged"]["compact"]["adapters"] > 3 * found["paged"]["lora"]["adapters"]
    assert found["resident"]["decoded_bytes"] == 0
    assert found["resident"]["adapters"] == found["paged"]["compact"]["adapters"]
    done = CliRunner().invoke(
        main, ["capacity", str(tmp_path / "out"), "--gpu-gib", "80", "--base-gib", "16", "--json"]
    )
    assert json.loads(done.stdout)["gpu_gib"] == 80
    for wrong in ((1.0, 2.0), (float("nan"), 0.0), (80.0, -1.0)):
        with pytest.raises(RecipeError, match="must leave room"):
            capacity(rows, *wrong)


def row_of(name: str, source_rank: int, expanded_rank: int, width: int = 1 << 20) -> dict[str, Any]:
    return {"id": name, "settings": {"source_rank": source_rank, "expanded_rank": expanded_rank, "width": width}}


def test_what_a_library_costs_by_slot() -> None:
    rows = [row_of("a", 16, 8), row_of("b", 8, 5)]
    found = serving(rows)
    assert found is not None
    assert found["lora"] == {"rank": 16, "slot_rank": 16, "bytes": 32 << 20, "adapters_per_gib": 32}
    assert found["compact"] == {"rank": 8, "slot_rank": 8, "bytes": 16 << 20, "adapters_per_gib": 64}
    assert found["warning"] is None
    outgrown = serving([*rows, row_of("c", 12, 20)])
    assert outgrown is not None
    assert (outgrown["outgrown"], outgrown["compact"]["adapters_per_gib"]) == (["c"], 16)
    assert "rank 20 exceeds the slot of 16 that the sources need (c)" in outgrown["warning"]
    none = serving([row_of("d", 16, 600)])
    assert none is not None
    assert none["compact"] == {"rank": 600, "slot_rank": None, "bytes": None, "adapters_per_gib": 0}
    assert "no slot for rank 600 after" in none["words"]
    assert serving([]) is None


def test_summary_print_and_page_say_what_the_slots_cost(tmp_path: Path) -> None:
    write_lora(tmp_path / "in" / "good", random_products(layers=1, rank=8), dtype=torch.bfloat16)
    words = ["batch", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0", "--no-report-html"]
    done = CliRunner().invoke(
        main, [*words, "--transform", "ke", "--ranks", "2,4,16", *by_file(tmp_path / "recipe.toml", shared_size=16)]
    )
    assert done.exit_code == 0, done.output
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["serving"]
    assert (summary["lora"]["slot_rank"], summary["compact"]["slot_rank"]) == (8, 32)
    page = (tmp_path / "out" / "report.html").read_text()
    for text in (summary["words"], summary["warning"]):
        assert text in done.stdout
        assert text in page
    assert summary["compact"]["bytes"] == 4 * summary["lora"]["bytes"]


def test_identities_are_safe_directories() -> None:
    for bad in ("../x", "/x", "a//b", "a/../b", ".hidden", "manifest.jsonl", "a b", "x" * 300, ""):
        with pytest.raises(InputError):
            check_ids([Item(bad, "x")], "list")
    for pair in (("a", "a"), ("a", "a/b")):
        with pytest.raises(InputError):
            check_ids([Item(name, "x") for name in pair], "list")
    check_ids([Item(name, "x") for name in safe_ids(["ok", "a b/c d", ".x/y", "ü"])], "list")
    alike = safe_ids(["x y", "x_y", "é", "è"])
    check_ids([Item(name, "x") for name in alike], "list")
    assert alike[1] == "x_y"
    items = [Item(str(number), "x") for number in range(10)]
    parts = [shard_of(items, (index, 3)) for index in (1, 2, 3)]
    assert sorted(item.id for part in parts for item in part) == sorted(item.id for item in items)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    make_library(tmp_path / "in", 2)
    for options, words in (
        ({"engine": "slurm"}, "engine is 'slurm'"), ({"shard": (3, 2)}, "shard is 3/2"), ({"workers": -1}, "workers is -1"),
        ({"max_failures": 0}, "max_failures is 0"),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            batch(tmp_path / "in", tmp_path / "out", RECIPE, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="holds no adapter"):
        discover(str(_empty(tmp_path)))
    for place in ("out", "tenant-0/good-000/out"):
        with pytest.raises((InputError, OutputError), match="inside of the"):
            batch(tmp_path / "in", tmp_path / "in" / place, RECIPE)
    with pytest.raises(InputError, match="replace the source"):
        batch(tmp_path / "in", tmp_path, RECIPE)
    (tmp_path / "bad.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(InputError, match="line 1: id and uri"):
        discover(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.jsonl").write_text("{\n")
    with pytest.raises(InputError, match="not a valid manifest"):
        discover(str(tmp_path / "bad.jsonl"))
    with pytest.raises((InputError, RecipeError)):
        discover("nosuchscheme://x")


def _empty(tmp_path: Path) -> Path:
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.parametrize("line", [b"\xff\xfe{}", b"{", b"[]", b'{"status": "ok"}', b'{"id": "a", "status": "ok"}'])
def test_a_manifest_of_a_stranger_is_refused_in_words(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "manifest.jsonl").write_bytes(line + b"\n")
    for place in (tmp_path, f"file://{tmp_path}"):
        found = CliRunner().invoke(main, ["capacity", str(place), "--gpu-gib", "2", "--base-gib", "1"])
        assert found.exit_code == 2 and ("damaged" in found.stderr or "lacks" in found.stderr), found.stderr


@pytest.mark.parametrize("seen", [False, True])
def test_an_interrupt_that_a_reader_took_for_damage_ends_the_run(monkeypatch: pytest.MonkeyPatch, seen: bool) -> None:
    monkeypatch.setattr(interrupt, "SEEN", threading.Event())

    def do(row: Any, _: Any) -> Any:
        if seen:
            interrupt.SEEN.set()
        raise InputError("truncated or not a safetensors file")

    if seen:
        with pytest.raises(KeyboardInterrupt):
            for_each([{"id": "a"}, {"id": "b"}], "reading", do, silent)
    else:
        assert [row["status"] for row in for_each([{"id": "a"}], "reading", do, silent)] == ["failed"]


def test_capacity_counts_what_is_loaded(tmp_path: Path) -> None:
    write_lora(tmp_path / "library" / "one", random_products(layers=1))
    record = batch(tmp_path / "library", tmp_path / "out", Recipe(transform="none", bytes=0.5))
    assert record["ok"] == 1
    row = json.loads((tmp_path / "out" / "manifest.jsonl").read_text())
    form = load_compact(tmp_path / "out" / "one").form
    loaded = sum(tensor.nbytes for tensor in form.tensors())
    assert row["settings"]["loaded_bytes"] == loaded > row["bytes"]
    found = capacity([row], 80, 16)
    assert found["paged"]["compact"]["mean_bytes"] == loaded
    assert found["resident"] == {
        "mean_bytes": row["bytes"], "decoded_bytes": 1 << 30, "adapters": 63 * (1 << 30) // row["bytes"],
    }  # fmt: skip
    assert capacity([row], 2, 1)["resident"]["adapters"] == 0


def test_the_reasons_of_bad_ones_are_printed(tmp_path: Path) -> None:
    write_lora(tmp_path / "in" / "good", random_products(layers=1))
    for number in range(7):
        write_lora(tmp_path / "in" / f"bad{number}", random_products(layers=1), use_dora=True)
    done = CliRunner().invoke(
        main, ["batch", str(tmp_path / "in"), str(tmp_path / "out"), "--workers", "0", *OPTIONS], env={"COLUMNS": "300"}
    )
    assert done.exit_code == 1
    assert "bad0: " in done.stdout and "DoRA" in done.stdout
    assert "and 2 more" in done.stdout
