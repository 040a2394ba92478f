"""The site's pages, gathered in one directory, so that each thing is written once.

python docs/pages.py build/docs

docs/*.md, pictures                 as they are
index, contributing, changelog      README.md, CONTRIBUTING.md, CHANGELOG.md
tutorial                            examples/library.ipynb, with what it printed
reference/cli                       --help of every verb
reference/python, reference/packages   docstrings: of what `bslora_convert` exports, and of every package

`make docs` calls it, and then Zensical, which reads `mkdocs.yml`.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import click

import bslora_convert
from bslora_convert.cli import main as verbs

ROOT = Path(__file__).resolve().parents[1]
STYLE = "site.css"
TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
NOTEBOOK = "examples/library.ipynb"


def gather(out: Path) -> None:
    """Writes every page into a directory, which is made anew."""
    shutil.rmtree(out, ignore_errors=True)
    pages = {
        **{path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))},
        **{page: moved((ROOT / name).read_text(encoding="utf-8")) for name, page in TOP.items()},
        "tutorial.md": moved(notebook(ROOT / NOTEBOOK)),
        "reference/cli.md": command_line(verbs),
        "reference/python.md": python(),
        "reference/packages.md": packages(),
    }
    for name, text in pages.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text, encoding="utf-8")
    for path in (ROOT / "docs" / STYLE, *sorted((ROOT / "docs").glob("*.svg"))):
        shutil.copy(path, out)


def moved(text: str) -> str:
    """A page's text with its links as they lead within the site."""
    for above in ("../docs/", "docs/"):
        text = text.replace(f"]({above}", "](")
    for name, page in (*TOP.items(), (NOTEBOOK, "tutorial.md")):
        text = text.replace(f"]({name}", f"]({page}")
    return text


def notebook(path: Path) -> str:
    """A notebook as Markdown: its texts, its code, and what that printed."""

    def parts() -> Iterator[str]:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            yield source if cell["cell_type"] == "markdown" else fenced(source, "python")
            for output in cell.get("outputs", ()):
                yield fenced("".join(output["text"]), "text")

    return "\n\n".join(parts())


def command_line(group: click.Group) -> str:
    """`--help` of the group and of each verb."""
    above = click.Context(group, info_name="bslora-convert", terminal_width=100)
    shown = [("bslora-convert", group.get_help(above))]
    for name, verb in group.commands.items():
        shown.append((name, verb.get_help(click.Context(verb, above, name, terminal_width=100))))
    return "\n\n".join(["# Command line", *(f"## {name}\n\n{fenced(text, 'text')}" for name, text in shown)])


def python() -> str:
    """What the package exports, under the names by which it is imported."""
    described = [
        f"::: {bslora_convert._HOMES[name]}.{name}\n    options:\n      heading: {name}\n      toc_label: {name}"
        for name in sorted(bslora_convert._HOMES, key=str.lower)
    ]
    return "\n\n".join(["# Python", "Everything here is imported from `bslora_convert` itself.", *described])


def packages() -> str:
    """Every package below `bslora_convert`, with all that is public in it."""
    places = sorted(path.parent.name for path in (ROOT / "bslora_convert").glob("*/__init__.py"))
    whole = [f"::: bslora_convert.{name}\n    options:\n      show_submodules: true" for name in places]
    return "\n\n".join(["# Packages", "[Contributing](../contributing.md) says what each is for.", *whole])


def fenced(text: str, language: str) -> str:
    """A block of code."""
    return f"```{language}\n{text.rstrip()}\n```"


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
