"""What is built from the checkout. `.ci/from-wheel` installs it and runs the main job from it."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.conftest import FIXTURES

ROOT = FIXTURES.parent
TAKEN = ("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml")
CORE = {"click", "fsspec", "jinja2", "matplotlib", "numba", "numpy", "psutil", "rich", "safetensors", "torch"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the wheel and the sdist."""
    place = tmp_path_factory.mktemp("built")
    source = place / "source"
    for folder in ("bslora_convert", "docs", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in TAKEN:
        shutil.copy(ROOT / name, source)
    code = f"from setuptools.build_meta import *; build_sdist({str(place)!r}); build_wheel({str(place)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return place


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "bslora_convert"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert held == {path.relative_to(ROOT).as_posix() for path in files}
    assert {"bslora_convert/py.typed", "bslora_convert/report/templates/report.html"} <= held


@pytest.mark.slow
def test_the_wheel_asks_for_what_the_main_job_needs(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
    needed = [
        line.removeprefix("Requires-Dist: ") for line in metadata.splitlines() if line.startswith("Requires-Dist: ")
    ]
    assert {line.partition(">=")[0] for line in needed if "extra ==" not in line} == CORE


@pytest.mark.slow
def test_the_sdist_holds_what_its_pages_speak_of(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        held = {name.partition("/")[2] for name in sdist.getnames()}
    assert {*TAKEN, *(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md"))} <= held
    assert not any(name.startswith("tests/") for name in held)
