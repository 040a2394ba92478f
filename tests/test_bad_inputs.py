"""Bad input of every kind through every verb: one line and the right exit code, never a traceback, nothing touched."""

import hashlib
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from bslora_convert import Recipe, batch, compress
from bslora_convert.cli import main
from tests.conftest import FIXTURES
from tests.planting import random_products, write_lora

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE = FIXTURES / "tiny" / "base"
Damage = Callable[[Path], Any]


# ---------------------------------------------------------------------------------------------- damages


def config(**changes: Any) -> Damage:
    def damage(place: Path) -> None:
        path = place / CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def written(name: str, content: bytes) -> Damage:
    return lambda place: (place / name).write_bytes(content)


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(place: Path) -> None:
        held = load_file(place / WEIGHTS)
        change(held)
        save_file(held, place / WEIGHTS)

    return damage


def first(side: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def at(held: dict[str, torch.Tensor]) -> None:
        key = next(key for key in sorted(held) if side in key)
        held[key] = change(held[key]).contiguous()

    return tensors(at)


def cut(share: float) -> Damage:
    def damage(place: Path) -> None:
        content = (place / WEIGHTS).read_bytes()
        (place / WEIGHTS).write_bytes(content[: int(share * len(content))])

    return damage


def as_archive(place: Path) -> None:
    (place / WEIGHTS).unlink()
    with zipfile.ZipFile(place / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(1 << 20))


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("executed",)


def as_code(place: Path) -> None:
    (place / WEIGHTS).unlink()
    (place / "adapter_model.bin").write_bytes(pickle.dumps({"x": Code()}))


def as_directory(place: Path) -> None:
    (place / WEIGHTS).unlink()
    (place / WEIGHTS).mkdir()


def to_itself(place: Path) -> None:
    (place / WEIGHTS).unlink()
    (place / WEIGHTS).symlink_to(WEIGHTS)


def without(part: str) -> Damage:
    return tensors(lambda held: [held.pop(key) for key in list(held) if part in key][:0])


HEADER = (1 << 62).to_bytes(8, "little")
# what is done to a good LoRA -> exit code
LORA: dict[str, tuple[Damage, int]] = {
    "gone": (shutil.rmtree, 2),
    "empty directory": (lambda place: [path.unlink() for path in place.iterdir()], 2),
    "no configuration": (lambda place: (place / CONFIG).unlink(), 2),
    "no weights": (lambda place: (place / WEIGHTS).unlink(), 2),
    "empty configuration": (written(CONFIG, b""), 2),
    "configuration of garbage": (written(CONFIG, bytes(range(256))), 2),
    "configuration cut short": (written(CONFIG, b'{"r": 8'), 2),
    "configuration is a list": (written(CONFIG, b"[1]"), 2),
    "configuration nested deep": (written(CONFIG, b"[" * 100_000), 2),
    "pointer instead of weights": (written(WEIGHTS, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), 2),
    "empty weights": (written(WEIGHTS, b""), 2),
    "weights of garbage": (written(WEIGHTS, bytes(range(256)) * 40), 2),
    "header says it is endless": (written(WEIGHTS, HEADER + b"{}"), 2),
    "header alone": (cut(0.02), 2),
    "half of the weights": (cut(0.5), 2),
    "weights but for a byte": (cut(0.9999), 2),
    "weights are a directory": (as_directory, 2),
    "weights are a link to themselves": (to_itself, 2),
    "weights are code": (as_code, 2),
    "weights are packed": (as_archive, 2),
    "NaN": (first("lora_A", lambda t: t * float("nan")), 2),
    "infinity": (first("lora_B", lambda t: t + float("inf")), 2),
    "half an adapter": (without("lora_B"), 2),
    "ranks that disagree": (first("lora_A", lambda t: t[:-1]), 2),
    "a vector": (first("lora_A", lambda t: t.flatten()), 2),
    "nothing in a tensor": (first("lora_A", lambda t: t[:0]), 2),
    "too large to square": (first("lora_A", lambda t: t * 1e30), 2),
    "no factors at all": (tensors(lambda held: (held.clear(), held.update(x=torch.zeros(2)))), 2),
    "r is a word": (config(r="eight"), 2),
    "r is below one": (config(r=0), 2),
    "alpha is endless": (config(lora_alpha=10**400), 2),
    "no alpha": (lambda place: written(CONFIG, b'{"peft_type": "LORA", "r": 8}')(place), 2),
    "a pattern that is none": (config(rank_pattern={"(": 4}), 2),
    "patterns are a list": (config(alpha_pattern=[1]), 2),
    "DoRA": (config(use_dora=True), 3),
    "PiSSA": (config(init_lora_weights="pissa"), 3),
    "IA3": (config(peft_type="IA3"), 3),
    "a setting of the future": (config(bend_space=True), 3),
    "three dimensions": (first("lora_A", lambda t: t[..., None].repeat(1, 1, 3)), 3),
    "whole numbers": (tensors(lambda held: held.update({k: t.to(torch.int8) for k, t in held.items()})), 3),
    "shards": (lambda place: (place / WEIGHTS).rename(place / "adapter_model-00001-of-00002.safetensors"), 3),
    "MLX": (lambda place: (place / WEIGHTS).rename(place / "adapters.safetensors"), 3),
}  # fmt: skip
# what is done to a compact adapter -> exit code
COMPACT: dict[str, tuple[Damage, int]] = {
    **{name: LORA[name] for name in (
        "gone", "empty directory", "no configuration", "no weights", "configuration of garbage", "configuration is a list",
        "empty weights", "weights of garbage", "half of the weights", "weights but for a byte", "weights are a directory",
    )},
    "another version": (config(format_version=99), 2),
    "no version": (config(format_version=None), 2),
    "no modules": (config(modules={}), 2),
    "modules of words": (config(modules={"q": "x"}), 2),
    "a transform of the future": (config(transform={"name": "warp"}), 2),
    "a group of nobody": (config(shared={"intra": {"ghost": {"rank": 1}}}), 2),
    "another coding": (config(coding={"version": 9}), 2),
    "flipped bits": (first("local_A", lambda t: -t), 2),
    "a record of garbage": (written("fidelity.json", b"{"), 2),
    "a record of another shape": (written("fidelity.json", b'{"compact": 1}'), 2),
}  # fmt: skip

ON = "--reference LORA --prompts rows.jsonl --base-model BASE"  # a base model of another size
# options that no verb takes: verb -> those that are tried
OPTIONS: dict[str, list[str]] = {
    "compress": [
        "--budget 0", "--budget 2", "--budget nan", "--budget x", "--bytes 0", "--bytes 7", "--bytes -1", "--bits 9",
        "--ranks 1,2", "--ranks 0,0,0", "--ranks a,b,c", "--ranks 1,1,-1", "--max-error 0", "--max-error 2",
        "--budget 0.5 --ranks 1,1,1", "--bytes 0.5 --budget 0.5", "--transform spline", "--min-shared 1", "--device tpu",
        "--device cuda:x", "--seed -1", "--seed x", "--dtype int8", "--metric two-sided", "--base-model X",
        "--prompts rows.jsonl", "--finetune", "--finetune rows.jsonl", "--finetune none.jsonl --base-model BASE",
        "--finetune rows.jsonl --base-model ./nowhere", "--finetune rows.jsonl --base-model BASE", "--max-steps 3",
        "--max-minutes 0", "--epochs 2", "--learning-rate -1", "--unknown", "--bytes 0.001",
        "--transform none --ranks 1,1,1", "--lora-alpha nan", "--lora-alpha 3",
    ],
    "expand": ["--rank 0", "--rank x", "--rank -3", "--dtype int4", "--format gguff", "--format official --rank 2"],
    "inspect": ["--unknown", "--lora-alpha x"],
    "analyze": ["--draws 0", "--draws x", "--base-model BASE", "--prompts rows.jsonl", "--beside nowhere", "--beside mine"],
    "compare": [
        "--budgets 0", "--budgets 2", "--budgets x", "--budgets ,", "--forms spline", "--save", "--prompts rows.jsonl",
        "--base-model BASE", "--dtype int8",
    ],
    "verify": [
        "--reference LORA --base-model BASE", "--reference nowhere --prompts rows.jsonl --base-model BASE",
        "--reference LORA --prompts none.jsonl --base-model BASE", "--reference LORA --prompts bad.jsonl --base-model BASE",
        "--reference LORA --prompts rows.jsonl --base-model ./nowhere", "--reference LORA --prompts rows.jsonl --base-model mine",
        "--reference OTHER --prompts rows.jsonl --base-model BASE", f"{ON} --limit 0", f"{ON} --max-kl nan",
        f"{ON} --min-retention 3", f"{ON} --max-accuracy-drop 0.1", f"{ON} --save --out x.json", f"{ON} --out mine/thesis.tex",
        f"{ON} --dtype int8", f"{ON} --batch-size 0", f"{ON} --max-new-tokens -1", f"{ON}",
    ],
    "finetune": [
        "--reference LORA --base-model BASE", "--reference nowhere --base-model BASE --prompts rows.jsonl",
        "--reference LORA --base-model BASE --prompts bad.jsonl", "--reference LORA --base-model BASE --prompts empty.jsonl",
        "--reference OTHER --base-model BASE --prompts rows.jsonl",
        "--reference LORA --base-model ./nowhere --prompts rows.jsonl",
        f"{ON} --heldout rows.jsonl", f"{ON} --resume", f"{ON} --heldout 1.5", f"{ON} --train most", f"{ON} --max-steps 0",
        f"{ON}",
    ],
    "capacity": ["--gpu-gib 1 --base-gib 2", "--gpu-gib x --base-gib 1", "--gpu-gib nan --base-gib 0", "--gpu-gib 80"],
    "batch": [
        "--workers -1", "--shard 3/2", "--shard x", "--max-failures 0", "--engine slurm", "--budget 5",
    ],
}  # fmt: skip

# outputs that must stay as they are
PLACES = (
    "mine",
    "mine/thesis.tex",
    "LORA",
    "LORA/in",
    "COMPACT",
    "COMPACT/sub",
    ".",
    "..",
    "library",
    "library/out",
    "a::b",
)
WRITERS = {
    "compress": "LORA OUT --transform none",
    "expand": "COMPACT OUT",
    "analyze": "LORA --out OUT --draws 2",
    "compare": "LORA --out OUT --forms svd_uniform",
    "batch": "library OUT --transform none --workers 0",
    "finetune": f"COMPACT OUT {ON} --max-steps 1",
}


# ---------------------------------------------------------------------------------------------- the place and what is held


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good adapters, rows, a library, and a directory of a user's."""
    place = tmp_path_factory.mktemp("world")
    kinds = {"self_attn.q_proj": (24, 24), "mlp.up_proj": (48, 24)}
    for name, seed in (("LORA", 0), ("OTHER", 1), ("library/a", 2), ("library/b", 3)):
        write_lora(place / name, random_products(layers=1, rank=4, seed=seed, kinds=kinds))
    compress(
        place / "LORA", place / "COMPACT", Recipe(transform="ke", ranks=(1, 1, 1), shared_size=12), report_html=False
    )
    batch(place / "library", place / "converted", Recipe(transform="none"), workers=0, report_html=False)
    (place / "mine" / ".git").mkdir(parents=True)
    (place / "mine" / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (place / "mine" / "thesis.tex").write_text("years of work")
    (place / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    (place / "bad.jsonl").write_text('{"prompt": 1}\n')
    (place / "empty.jsonl").write_text("")
    return place


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the world to work in."""
    shutil.copytree(world, tmp_path / "here", symlinks=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "here"


def state(place: Path) -> dict[str, str]:
    """Everything below a place: files by their hash."""
    return {
        path.relative_to(place).as_posix(): (
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else "no file"
        )
        for path in sorted(place.rglob("*"))
    }


def run(*words: str) -> Result:
    return CliRunner().invoke(main, [str(BASE) if word == "BASE" else word for word in words])


def held(result: Result, code: int) -> None:
    """One line of error and the exit code."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    assert "internal error" not in result.output
    assert isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.lower().startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert len(lines[0]) > 20


def command(verb: str) -> list[str]:
    """A verb's call on what was damaged, which stands under the name x."""
    return {
        "inspect": ["inspect", "x"],
        "analyze": ["analyze", "x", "--draws", "2", "--out", "out"],
        "compress": ["compress", "x", "out"],
        "compare": ["compare", "x", "--forms", "svd_uniform", "--out", "out"],
        "expand": ["expand", "x", "out"],
        "verify": ["verify", "x", "--reference", "LORA", "--base-model", "BASE", "--prompts", "rows.jsonl", "--save"],
        "finetune": ["finetune", "x", "out", "--reference", "LORA", "--base-model", "BASE", "--prompts", "rows.jsonl"],
    }[verb]


def damaged(here: Path, verb: str, source: str, damage: tuple[Any, int]) -> tuple[Any, int]:
    """What a verb says of a copy that was damaged, and the code that is expected; nothing else changes."""
    shutil.copytree(source, "x")
    change, code = damage
    change(Path("x"))
    before = state(here)
    result = run(*command(verb))
    assert state(here) == before
    return result, code


@pytest.mark.parametrize("damage", LORA)
@pytest.mark.parametrize("verb", ["inspect", "analyze", "compress", "compare"])
def test_a_damaged_lora(here: Path, verb: str, damage: str) -> None:
    result, code = damaged(here, verb, "LORA", LORA[damage])
    if verb == "inspect" and result.exit_code == 0:  # it tells what can't be converted, and that is its job
        assert code == 3
    else:
        held(result, code)


@pytest.mark.parametrize("damage", COMPACT)
@pytest.mark.parametrize("verb", ["inspect", "expand", "verify", "finetune"])
def test_a_damaged_compact_adapter(here: Path, verb: str, damage: str) -> None:
    result, code = damaged(here, verb, "COMPACT", COMPACT[damage])
    if verb == "inspect" and damage == "flipped bits":
        assert (result.exit_code, "NOT what was written" in result.stdout) == (0, True)
    else:
        held(result, code)


@pytest.mark.parametrize("damage", ["NaN", "DoRA", "half of the weights", "configuration of garbage", "shards"])
def test_a_damaged_member_of_a_library(here: Path, damage: str) -> None:
    LORA[damage][0](Path("library/b"))
    before = state(here)
    result = run("batch", "library", "out", "--transform", "none", "--workers", "0", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["ok"] == 1
    assert "Traceback" not in result.output
    assert {name: content for name, content in state(here).items() if not name.startswith("out")} == before


@pytest.mark.parametrize(("verb", "words"), [(verb, words) for verb, many in OPTIONS.items() for words in many])
def test_wrong_options(here: Path, verb: str, words: str) -> None:
    given = {
        "compress": ["LORA", "out"], "expand": ["COMPACT", "out"], "inspect": ["LORA"], "analyze": ["LORA"], "compare": ["LORA"],
        "verify": ["COMPACT"], "finetune": ["COMPACT", "out"], "capacity": ["converted"], "batch": ["library", "out"],
    }[verb]  # fmt: skip
    before = state(here)
    held(run(verb, *given, *words.split()), 2)
    assert state(here) == before


def writes() -> Iterator[tuple[str, str, bool]]:
    """Every verb into every place, but what --overwrite may replace and what is a place like any other."""
    for verb, place, overwrite in product(WRITERS, PLACES, (False, True)):
        replaces = place == "COMPACT" and overwrite and verb in ("compress", "analyze", "compare")
        if not replaces and (place != "library/out" or verb == "batch"):
            yield verb, place, overwrite


@pytest.mark.parametrize(("verb", "place", "overwrite"), writes())
def test_places_that_are_not_written_to(here: Path, verb: str, place: str, overwrite: bool) -> None:
    words = [place if word == "OUT" else word for word in WRITERS[verb].split()]
    before = state(here)
    held(run(verb, *words, *(["--overwrite"] if overwrite else [])), 2)
    assert state(here) == before
    assert [path.name for path in here.parent.iterdir()] == ["here"]
