"""Completion by the shell, with the lines that docs/install.md gives."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bslora_convert.cli import main
from tests.conftest import FIXTURES

PAGE = (FIXTURES.parent / "docs" / "install.md").read_text(encoding="utf-8")
SCRIPT = """#!{python}
import sys
sys.path.insert(0, {root!r})
from bslora_convert.__main__ import main
main()
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Variables under which `bslora-convert` is this checkout's, as pip would install it."""
    script = tmp_path / "bslora-convert"
    script.write_text(SCRIPT.format(python=sys.executable, root=str(FIXTURES.parent)))
    script.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


def printed(environment: dict[str, str], *words: str, **variables: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, env=environment | variables, timeout=60, check=True)
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_line_and_a_script(shell: str, environment: dict[str, str]) -> None:
    assert f"_BSLORA_CONVERT_COMPLETE={shell}_source bslora-convert" in PAGE
    script = printed(environment, "bslora-convert", _BSLORA_CONVERT_COMPLETE=f"{shell}_source")
    assert f"_BSLORA_CONVERT_COMPLETE={shell}_complete" in script
    assert "bslora-convert" in script


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("com", {"compress", "compare"}), ("", set(main.commands)), ("compress --transform ", {"ke", "gt", "ss", "none", "auto"})],
)  # fmt: skip
def test_verbs_and_values_are_offered(typed: str, offered: set[str], environment: dict[str, str]) -> None:
    words = {"COMP_WORDS": f"bslora-convert {typed}", "COMP_CWORD": str(1 + typed.count(" "))}
    answer = printed(environment, "bslora-convert", _BSLORA_CONVERT_COMPLETE="bash_complete", **words)
    assert {line.partition(",")[2] for line in answer.splitlines()} == offered


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
def test_the_line_for_bash_works_in_bash(environment: dict[str, str]) -> None:
    line = next(line for line in re.findall(r"^eval .*$", PAGE, re.M) if "bash_source" in line)
    typed = 'COMP_WORDS=(bslora-convert com); COMP_CWORD=1; _bslora_convert_completion bslora-convert; echo "${COMPREPLY[@]}"'
    assert set(printed(environment, "bash", "-c", f"{line}\n{typed}").split()) == {"compress", "compare"}
