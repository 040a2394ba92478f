"""Every page: one file, the same bytes each time, for any screen, any scheme, paper and the keyboard; what it says at first."""

import html.parser
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from bslora_convert.cli import main
from bslora_convert.cli.verb import Output
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.report import verdict
from bslora_convert.report.functional import with_functional
from bslora_convert.results.behaviour import Verification
from bslora_convert.results.library import BatchSummary
from bslora_convert.verbs.analyze import analyze
from bslora_convert.verbs.batch import batch
from bslora_convert.verbs.compare import compare
from bslora_convert.verbs.compress import compress
from tests.planting import random_products, write_lora
from tests.records import blank

PAGES = ("report", "coded", "analysis", "comparison", "library")
HINT = "Behaviour has not been measured"
FUNCTIONAL = blank(
    Verification, kl=0.24024, base_kl=2.97, retention=0.919, agreement=0.565, prompts={"rows": 8, "tokens": 757},
    perplexity={"base": 3.0, "reference": 1.0, "compact": 2.0}, notes=["ATTENTION: the answers differ", "rows were cut"],
    thresholds={
        "max_kl": {"limit": 0.0001, "value": 0.24024, "passed": False},
        "min_retention": {"limit": 0.5, "value": 0.919, "passed": True},
    },
)  # fmt: skip


class Element:
    """A tag with its attributes and what stands in it."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes = tag, attributes
        self.inside: list[Element] = []
        self.text = ""

    def all(self, tag: str) -> list["Element"]:
        return [found for child in self.inside for found in ([child] if child.tag == tag else []) + child.all(tag)]


class Reader(html.parser.HTMLParser):
    """The tree of a page."""

    EMPTY = ("meta", "link", "img", "source", "br")

    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].inside.append(element)
        if tag not in self.EMPTY:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.text += data


def tree(page: str) -> Element:
    reader = Reader()
    reader.feed(page)
    assert reader.open == [reader.root]
    return reader.root


def make(place: Path) -> dict[str, str]:
    """All pages, from one adapter."""
    lora = write_lora(place / "in" / "lora", random_products(layers=3), base_model_name_or_path="org/base")
    for rank in (1, 2, 3):  # sizes and errors that differ are a picture
        write_lora(place / "in" / f"other-{rank}", random_products(layers=3, seed=1, rank=rank))
    (write_lora(place / "in" / "broken", random_products()) / "adapter_config.json").write_text("{")
    compress(lora, place / "report", Recipe(transform="ke", budget=0.7))
    compress(lora, place / "coded", Recipe(transform="none", bytes=0.25))
    analyze(lora, place / "analysis", draws=2)
    compare(lora, place / "comparison", budgets=[0.5, 0.02], forms=["svd_adaptive", "bslora_ke"])
    batch(place / "in", place / "library", Recipe(transform="none", budget=0.5), workers=0)
    files = dict.fromkeys(PAGES, "report.html") | {name: f"{name}.html" for name in ("analysis", "comparison")}
    return {name: (place / name / file).read_text(encoding="utf-8") for name, file in files.items()}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make(tmp_path_factory.mktemp("pages"))


@pytest.mark.parametrize("name", PAGES)
def test_nothing_comes_from_elsewhere(pages: dict[str, str], name: str) -> None:
    page = tree(pages[name])
    for tag, attribute in (("img", "src"), ("source", "srcset"), ("link", "href")):
        assert all(element.attributes[attribute].startswith("data:") for element in page.all(tag))
    assert not page.all("iframe")
    assert all("src" not in script.attributes for script in page.all("script"))
    assert not re.search(r"url\(|@import|https?://", pages[name])
    links = [link.attributes["href"] for link in page.all("a")]
    assert sorted(links) == (
        ["lora/report.html", *(f"other-{rank}/report.html" for rank in (1, 2, 3))] if name == "library" else []
    )


@pytest.mark.parametrize("name", PAGES)
def test_dark_print_and_narrow_are_provided_for(pages: dict[str, str], name: str) -> None:
    style = "".join(found.text for found in tree(pages[name]).all("style"))
    assert "@media screen and (prefers-color-scheme: dark)" in style
    assert "@media print" in style
    assert "color-scheme: light dark" in style
    page = tree(pages[name])
    assert page.all("picture")
    for figure in page.all("figure"):
        narrow = figure.all("source")
        assert len(narrow) == (figure.attributes.get("class") == "whole")
        assert all("max-width" in source.attributes["media"] for source in narrow)
        assert figure.all("img")[0].attributes["alt"]
    around = [
        table for place in page.all("div") if place.attributes.get("class") == "wide" for table in place.all("table")
    ]
    plain = [table for table in page.all("table") if table.attributes.get("class") != "settings"]
    assert len(around) == len(plain)  # a table that is too wide moves in a place of its own
    for place in page.all("div"):
        if place.attributes.get("class") == "wide":
            assert place.attributes["tabindex"] == "0"
            assert place.attributes["aria-label"]


@pytest.mark.parametrize("name", PAGES)
def test_heads_have_a_scope(pages: dict[str, str], name: str) -> None:
    page = tree(pages[name])
    assert page.all("th")
    for table in page.all("table"):
        assert all(head.attributes["scope"] == "col" for top in table.all("thead") for head in top.all("th"))
        assert all(head.attributes["scope"] == "row" for body in table.all("tbody") for head in body.all("th"))
    assert all(head.attributes.get("scope") in ("row", "col") for head in page.all("th"))


@pytest.mark.parametrize("name", PAGES)
def test_tables_that_sort_say_so_and_take_the_keyboard(pages: dict[str, str], name: str) -> None:
    page = tree(pages[name])
    sorting = [table for table in page.all("table") if "sorts" in table.attributes.get("class", "").split()]
    assert len(sorting) == (name in ("comparison", "library"))
    assert ("sorts by it" in page.text) == bool(sorting)
    assert len(page.all("script")) == len(sorting)
    for table in sorting:
        heads = table.all("thead")[0].all("th")
        assert all(len(head.all("button")) == 1 for head in heads)
        assert [head.attributes["aria-sort"] for head in heads if "aria-sort" in head.attributes] == ["descending"]
        rows = table.all("tbody")[0].all("tr")
        assert all(len(row.all("td")) + len(row.all("th")) == len(heads) for row in rows)


@pytest.mark.parametrize("name", PAGES)
def test_what_was_not_measured_is_said_before_the_plots_with_the_command(pages: dict[str, str], name: str) -> None:
    before = pages[name].partition("<figure")[0]
    assert HINT in before
    (said,) = (box for box in tree(pages[name]).all("div") if box.attributes.get("class") == "unmeasured")
    program, verb, *arguments = shlex.split(said.all("pre")[0].text)
    assert program == "bslora-convert"
    known = {option for parameter in main.commands[verb].params for option in parameter.opts}
    assert {word for word in arguments if word.startswith("--")} <= known
    if verb == "verify":
        assert "--save" in arguments
        assert arguments[0].startswith("THIS_DIR")
    if name == "report":
        assert arguments[arguments.index("--base-model") + 1] == "org/base"
    if name == "comparison":
        assert arguments[arguments.index("--budgets") + 1] == "0.5,0.02"
        assert arguments[arguments.index("--forms") + 1] == "svd_adaptive,bslora_ke"


def test_the_hint_is_gone_once_there_is_a_measurement(pages: dict[str, str]) -> None:
    page = with_functional(pages["report"], FUNCTIONAL)
    assert HINT not in page
    assert with_functional(page, FUNCTIONAL) == page
    text = " ".join(tree(page).text.split())
    assert "Missed: the KL to the original is 0.2402 nats a token; at most 0.0001 nats a token was asked for." in text
    assert "max_kl" not in text
    cells = [[cell.text.strip() for cell in row.inside] for row in tree(page).all("tr")]
    assert ["Share of the adapter's effect kept", "at least 50%", "91.9%", "met"] in cells
    assert "ATTENTION: the answers differ." in text
    assert text.count("answers differ") == 1
    assert {head.attributes.get("scope") for head in tree(page).all("th")} == {"row", "col"}


@pytest.mark.parametrize(
    ("name", "limit", "value", "words"),
    [
        ("min_agreement", 0.9, 0.565, "share of tokens with the same first choice is 56.5%; at least 90% was"),
        ("min_retention", 0.98, 0.97994, "effect kept is 97.994%; at least 98% was"),
        ("max_accuracy_drop", 0.01, 0.03, "largest drop of a task's score is 3%; at most 1% was"),
    ],
)
def test_thresholds_are_words(name: str, limit: float, value: float, words: str) -> None:
    checked = {name: {"limit": limit, "value": value, "passed": False}}
    said = verdict.behaviour(blank(Verification, thresholds=checked))
    assert words in said[-1]
    assert name not in said[-1]


def test_the_bytes_are_the_same_each_time(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=2))
    for name in ("first", "second"):
        compress(lora, tmp_path / name, Recipe(transform="ke", budget=0.7), recorded_as="source")
    for file in ("report.html", "README.md"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_the_same_numbers_give_the_same_comparison_and_library(tmp_path: Path) -> None:
    from bslora_convert.report import comparison, library

    lora = write_lora(tmp_path / "in" / "lora", random_products())
    record = compare(lora, budgets=[0.5], forms=["svd_adaptive"])
    batch(tmp_path / "in", tmp_path / "out", Recipe(transform="none", budget=0.5), workers=0, report_html=False)
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    summary = BatchSummary.from_dict(json.loads((tmp_path / "out" / "summary.json").read_text()))
    assert library.render(summary, rows) == library.render(summary, rows)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        comparison.write(tmp_path / name, record)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_what_must_not_be_overlooked_stands_first(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1))
    changing = lora / "1_Pooling" / "config.json"
    changing.parent.mkdir()
    changing.write_text("{}")
    (lora / "unknown_file.bin2").write_text("x")
    record = compress(lora, tmp_path / "out", Recipe(transform="none"))
    assert len(record["notes"]) == 2
    page = (tmp_path / "out" / "report.html").read_text()
    (urgent,) = (note for note in tree(page).all("p") if note.attributes.get("class") == "attention")
    assert urgent.text.startswith("ATTENTION: ")
    assert page.index('class="attention"') < page.index('<dl class="figures"')
    assert page.count("what the model answers") == 1
    assert "unknown_file.bin2" in page.partition("<h2>Notes</h2>")[2]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.index("> **ATTENTION:** ") < card.index("| parameters |")
    assert card.count("ATTENTION") == 1
    assert "\nNote: not known" in card


def test_urgent_notes_are_not_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[tuple[str, dict[str, Any]]] = []

    def secho(text: str, err: bool, **style: Any) -> None:
        shown.append((text, style))

    monkeypatch.setattr("click.secho", secho)
    Output(as_json=False, quiet=False, verbose=False).notes(["ATTENTION: look", "by the way"])
    assert shown == [
        ("note: ATTENTION: look", {"fg": "yellow", "dim": None}),
        ("note: by the way", {"fg": None, "dim": True}),
    ]
