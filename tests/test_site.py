"""The site that `make docs` builds: strictly, with every link, picture and anchor there, and every public name on it."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import bslora_convert
from bslora_convert.cli import main
from tests.conftest import FIXTURES

pytest.importorskip("zensical")

ROOT = FIXTURES.parent
ELSEWHERE = ("http", "https", "mailto", "data", "javascript")


class Page(HTMLParser):
    """links: whatever a page leads to or shows. names: what can be linked to in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.names: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            elif name in ("id", "name") and value:
                self.names.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("site")
    shutil.copy(ROOT / "mkdocs.yml", place)
    for name in ("docs", "bslora_convert"):
        (place / name).symlink_to(ROOT / name)
    for words in ([ROOT / "docs" / "pages.py", "build/docs"], ["-m", "zensical", "build", "--strict"]):
        done = subprocess.run([sys.executable, *words], cwd=place, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    return place / "build" / "site"


@pytest.mark.slow
def test_every_link_leads_somewhere(site: Path) -> None:
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > 15
    followed = 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme in ELSEWHERE:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name} leads to {link}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].names, f"{path.name} leads to {link}"
            followed += 1
    assert followed > 500


@pytest.mark.slow
def test_no_list_or_table_runs_into_a_paragraph(site: Path) -> None:
    """GitHub is more lenient with blank lines than what makes the site."""
    for path in site.glob("*.html"):
        text = re.sub(r"(?s)<(script|pre|code|nav)\b.*?</\1>", "", path.read_text(encoding="utf-8"))
        assert not re.search(r"\* <strong>|\*\*|\|\s*-{3}|```", text), path.name


@pytest.mark.slow
def test_nothing_is_fetched_from_elsewhere_to_show_a_page(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert "fonts.googleapis" not in text
        assert 'src="http' not in text


@pytest.mark.slow
def test_the_reference_holds_every_public_name_and_verb(site: Path) -> None:
    names = Page(site / "reference" / "python.html").names
    assert {f"{bslora_convert._HOMES[name]}.{name}" for name in bslora_convert._HOMES} <= names
    assert set(main.commands) <= Page(site / "reference" / "cli.html").names
    packages = Page(site / "reference" / "packages.html").names
    assert {
        f"bslora_convert.{path.parent.name}" for path in (ROOT / "bslora_convert").glob("*/__init__.py")
    } <= packages
    assert " of 32\n" in (site / "tutorial.html").read_text(encoding="utf-8")


def test_every_page_is_in_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f": {page.name}\n" in menu for page in (ROOT / "docs").glob("*.md"))
