"""The page stands alone, says the answer first and matches the record; the verdict tells wins from losses."""

import base64
import html.parser
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bslora_convert.recipe.recipe import Recipe
from bslora_convert.report import verdict
from bslora_convert.report.environment import size
from bslora_convert.results.adapter import Fidelity
from bslora_convert.verbs.compress import compress
from tests.planting import random_products, write_lora
from tests.records import blank


class Page(html.parser.HTMLParser):
    """Collects text, image sources and links."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.images: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "img":
            self.images.append(found["src"] or "")
        if tag in ("a", "link", "script", "iframe"):
            self.links.append(found.get("href") or found.get("src") or "")

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(path: Path) -> Page:
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


@pytest.mark.parametrize("transform", ["ke", "none"])
def test_the_page_is_self_contained(tmp_path: Path, transform: str) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=12))
    record = compress(lora, tmp_path / "out", Recipe(transform=transform, budget=0.7))
    page = read(tmp_path / "out" / "report.html")
    assert len(page.images) == (4 if transform == "ke" else 3)
    for source in page.images:
        assert source.startswith("data:image/svg+xml;base64,")
        svg = base64.b64decode(source.partition(",")[2])
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert all(link == "data:," for link in page.links)
    whole = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']https?:""", whole)
    text = " ".join(page.text)
    assert verdict.sentences(record)[0] in text
    assert f"{record['weight']['relative_error']:.4f}" in text
    assert f"{record['compact']['parameters']:,}" in text


def test_names_from_the_input_are_escaped(tmp_path: Path) -> None:
    products = {f"{name}<script>alert(1)</script>": p for name, p in random_products(layers=1).items()}
    lora = write_lora(tmp_path / "lora", products)
    compress(lora, tmp_path / "out", Recipe(transform="none"))
    assert "<script>" not in (tmp_path / "out" / "report.html").read_text()


def record(transform: str, error: float, svd: float, expanded: int = 8) -> Fidelity:
    return blank(
        Fidelity,
        compact={"transform": transform, "parameter_ratio": 0.4, "byte_ratio": 0.5, "expanded_rank": expanded},
        weight={
            "relative_error": error,
            "energy_kept": 1 - error**2,
            "gain": 1.0,
            "modules": [{"name": "q", "energy": 1.0, "relative_error": error, "local_rank": 4}],
        },
        baselines={"svd_adaptive": {"relative_error": svd}},
        source={"ranks": {"8": 14}},
    )


@pytest.mark.parametrize(
    ("error", "svd", "words"),
    [(0.2, 0.3, "Sharing paid"), (0.3, 0.2, "Sharing did not pay"), (0.2, 0.2, "neither paid nor cost")],
)
def test_the_verdict_follows_the_numbers(error: float, svd: float, words: str) -> None:
    assert words in " ".join(verdict.sentences(record("ke", error, svd)))
    assert "Sharing" not in " ".join(verdict.sentences(record("none", error, svd)))


def test_a_larger_expanded_rank_is_said() -> None:
    assert "slots" in " ".join(verdict.sentences(record("ke", 0.2, 0.2, expanded=14)))
    assert "slots" not in " ".join(verdict.sentences(record("ke", 0.2, 0.2, expanded=8)))


def test_sizes_for_a_reader() -> None:
    assert size(512) == "512 B"
    assert size(9_824_056) == "9.82 MB"
    assert size(5e12) == "5000.00 GB"
