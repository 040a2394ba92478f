"""What works with the core dependencies alone, and what names the extra that it needs; the rest is hidden in a process."""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bslora_convert.extras import EXTRAS
from tests.conftest import FIXTURES
from tests.planting import random_products, write_lora
from tests.recipes import by_file

TINY = FIXTURES / "tiny"
HIDDEN = {
    *(package for packages in EXTRAS.values() for package in packages), "bitsandbytes", "datasets", "huggingface_hub", "joblib",
    "pandas", "scipy", "tokenizers",
}  # fmt: skip
MODULES = {"lm-eval": "lm_eval", "scikit-learn": "sklearn"}  # where a package is imported by another name
RUN = """
import json, sys

class Hidden:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {hidden}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hidden)
from click.testing import CliRunner
from bslora_convert.cli import main

done = [CliRunner().invoke(main, words) for words in {commands}]
print(json.dumps([(run.exit_code, run.stdout, run.stderr) for run in done]))
"""


def without_extras(*commands: Sequence[str | Path]) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command, all in one process in which only the core dependencies are found."""
    code = RUN.format(hidden=HIDDEN, commands=[[str(word) for word in words] for words in commands])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[tuple[int, str, str]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("extras")
    write_lora(made / "library" / "one", random_products())
    return made


@pytest.fixture(scope="module")
def lora(place: Path) -> Path:
    return place / "library" / "one"


def test_the_main_job_needs_no_extra(lora: Path, place: Path) -> None:
    ranks = ("--ranks", "2,1,1", *by_file(place / "recipe.toml", shared_size=32))
    for code, _, said in without_extras(
        ("inspect", lora),
        ("compress", lora, place / "compact", *ranks),
        ("inspect", place / "compact"),
        ("expand", place / "compact", place / "again"),
        ("batch", lora.parent, place / "out", "--workers", "1", *ranks),
        ("capacity", place / "out", "--gpu-gib", "80", "--base-gib", "20"),
        ("compare", lora, "--forms", "svd_adaptive", "--budgets", "0.5"),
    ):
        assert code == 0, said
    assert (place / "compact" / "report.html").stat().st_size > 1000


def test_what_needs_an_extra_names_it_in_one_line_before_anything_is_written(lora: Path, place: Path) -> None:
    on_base = ("--base-model", TINY / "base")
    prompts = TINY / "gsm8k-heldout.jsonl"
    out, groups = place / "never", by_file(place / "groups.toml", groups="auto")
    cases: dict[tuple[Any, ...], tuple[str, str]] = {
        ("verify", lora, "--reference", lora, "--prompts", prompts, *on_base): ("base", "--base-model"),
        ("finetune", lora, out, "--reference", lora, "--prompts", prompts, *on_base): ("base", "--base-model"),
        ("compress", lora, out, "--prompts", prompts, *on_base): ("base", "--base-model"),
        ("batch", lora.parent, out, "--prompts", prompts, *on_base): ("base", "--base-model"),
        ("analyze", lora, "--prompts", prompts, *on_base): ("base", "--base-model"),
        ("verify", lora, "--reference", lora, "--tasks", "local_svamp"): ("eval", "--tasks"),
        ("batch", lora.parent, out, "--engine", "ray"): ("ray", "--engine ray"),
        ("expand", lora, out, "--for", "llama.cpp", *on_base): ("gguf", "--format gguf"),
        ("analyze", lora, "--out", out): ("analysis", "analyze"),
        ("compare", lora, "--out", out): ("analysis", "the form vb_lora"),
        ("compress", lora, out, *groups): ("analysis", "groups auto"),
        ("batch", lora.parent, out, *groups): ("analysis", "groups auto"),
    }
    for (words, (extra, begins)), (code, printed, said) in zip(cases.items(), without_extras(*cases), strict=True):
        missing = ", ".join(EXTRAS[extra])
        assert (code, printed) == (2, ""), (words, said)
        assert said.splitlines()[-1] == (
            f"error: {begins} needs {missing}, the extra `{extra}`: in a checkout of bslora-convert, "
            f"pip install -c constraints.txt '.[{extra}]'"
        ), words
        assert "Traceback" not in said
    assert not out.exists()


def test_the_extras_are_those_of_the_project() -> None:
    project = tomllib.loads((FIXTURES.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        names = [re.split(r"[>=\[]", line)[0] for line in project[extra] if not line.startswith("bslora-convert")]
        assert sorted(MODULES.get(name, name) for name in names) == sorted(packages)
    everything = next(line for line in project["test"] if line.startswith("bslora-convert"))
    assert set(re.findall(r"\w+", everything.partition("[")[2])) == set(project) - {"test"}
