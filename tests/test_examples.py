"""examples/: the script runs, and the notebook is that script with what it printed."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import nbformat
import pytest

from bslora_convert.cli import main
from tests.conftest import FIXTURES

pytest.importorskip("xllamacpp")

EXAMPLES = FIXTURES.parent / "examples"
sys.path.append(str(EXAMPLES))
from notebook import NOTEBOOK, SCRIPT, cells_of, execute  # noqa: E402  # beside the example


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A place with examples/ and fixtures/ alone, for the example writes beside them."""
    shutil.copytree(EXAMPLES, tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "fixtures").symlink_to(FIXTURES)
    return tmp_path


def printed(notebook: Any) -> str:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return "".join(out.text for cell in cells for out in cell.outputs if out.get("name") == "stdout")


def told(text: str) -> list[str]:
    """Lines without their figures and texts, which processors may round otherwise."""
    return [re.sub(r"'.*'|\".*\"|\d[\d,.]*", "#", line) for line in text.splitlines()]


@pytest.mark.slow
def test_the_script_runs_and_tenants_answer(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "examples/library.py"], cwd=checkout, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == told(printed(nbformat.read(NOTEBOOK, as_version=4)))
    known = dict(re.findall(r"^(base model|banking77): (\d+) of 32$", done.stdout, re.M))
    assert int(known["base model"]) == 0
    assert int(known["banking77"]) > 10
    assert (checkout / "build" / "example" / "compact" / "report.html").is_file()


@pytest.mark.slow
def test_the_notebook_runs_where_a_notebook_does(checkout: Path) -> None:
    ran = execute(cells_of(checkout / "examples" / SCRIPT.name), checkout / "examples")
    assert told(printed(ran)) == told(printed(nbformat.read(NOTEBOOK, as_version=4)))


def test_the_notebook_is_the_script_and_names_no_machine() -> None:
    """`python examples/notebook.py` writes it anew."""
    kept, made = nbformat.read(NOTEBOOK, as_version=4), cells_of(SCRIPT)
    nbformat.validate(kept)
    assert [(c.id, c.cell_type, c.source) for c in kept.cells] == [(c.id, c.cell_type, c.source) for c in made.cells]
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"\"(stderr|traceback)\"|/(home|root|tmp|work|Users|usr)/", text)


def test_the_commands_that_it_tells_are_commands() -> None:
    text = re.sub(r"\\\n#\s*", "", SCRIPT.read_text(encoding="utf-8"))
    lines = re.findall(r"^# +bslora-convert (.+)$", text, re.M)
    assert len(lines) == 3
    for line in lines:
        verb, *words = shlex.split(line)
        try:
            main.commands[verb].make_context(verb, words)
        except click.UsageError as error:
            raise AssertionError(f"{line}: {error.format_message()}") from None
