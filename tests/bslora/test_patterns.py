"""Names as patterns: back again whatever they are, few where they are regular, and nothing large from a hostile one."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bslora_convert import compress
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.patterns import MOST, names_of, patterns
from bslora_convert.errors import InputError
from bslora_convert.modules.names import natural_order
from tests.planting import random_products, write_lora

PART = st.sampled_from(["layers", "experts", "0", "1", "2", "10", "007", "up_proj", "-1", "1a", "é"])
NAME = st.lists(PART, min_size=1, max_size=5).map(".".join)


@given(st.sets(NAME, max_size=40))
def test_names_come_back(names: set[str]) -> None:
    found = patterns(names)
    assert sorted(name for members in found.values() for name in members) == sorted(names)
    for pattern, members in found.items():
        assert names_of(pattern, MOST, "x") == members == sorted(members, key=natural_order)


def test_regular_names_are_one_pattern() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up" for layer in range(3, 12) for expert in range(64)]
    assert list(patterns(names)) == ["model.layers.{3-11}.mlp.experts.{0-63}.up"]
    assert list(patterns([*names[:-1], "lm_head"])) == [
        "lm_head",
        "model.layers.{3-10}.mlp.experts.{0-63}.up",
        "model.layers.11.mlp.experts.{0-62}.up",
    ]


@pytest.mark.parametrize(
    "pattern",
    ["a.{0-3", "a.{}", "a.{3-0}", "a.{0-0}", "a.{0-03}", "a.x{0-3}", "{0-999}.{0-999}.{0-999}", "a." * 3000,
     "{0-99999999999999999999}", "{-1-3}", "{0-3}{0-3}"],
)  # fmt: skip
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(InputError, match=r"^here: "):
        names_of(pattern, MOST, "here")


def config(modules: dict[str, Any], shared: dict[str, Any] | None = None) -> dict[str, Any]:
    transform = {"name": "ke", "size": 4} if shared else {"name": "none"}
    return {"transform": transform, "shared": shared or {}, "modules": modules}


def test_what_differs_is_a_list() -> None:
    shared = {"intra": {"layers.{0-2}": {"rank": "1 2 3", "kernel_rank": 1}}}
    said = config({"layers.{0-2}.up": {"shape": [8, 12], "rank": "4 0 2", "intra": "layers.{0-2}"}}, shared)
    layout = Layout.parse(said, "x")
    assert [entry.rank for entry in layout.modules.values()] == [4, 0, 2]
    assert [entry.groups["intra"] for entry in layout.modules.values()] == ["layers.0", "layers.1", "layers.2"]
    assert [group.rank for group in layout.shared["intra"].values()] == [1, 2, 3]
    assert layout.to_config() == said


@pytest.mark.parametrize(
    ("modules", "words"),
    [
        ({"l.{0-2}": {"shape": [8, 12], "rank": "4 0"}}, "says 2 things of 3 modules"),
        ({"l.{0-1}": {"shape": [8, 12], "rank": "4 x"}}, "whole numbers are expected"),
        ({"l.{0-1}": {"shape": [8, 12], "rank": "4 " + "9" * 5000}}, "whole numbers are expected"),
        ({"l.{0-1}": {"shape": [8, 12], "rank": "4 -1"}}, "whole numbers are expected"),
        ({"l.{0-1}": {"shape": [8, 12], "rank": 1}, "l.1": {"shape": [8, 12], "rank": 1}}, "stands there twice"),
        ({"a.{0-9999}.{0-99}": {"shape": [1, 1], "rank": 1}, "b.{0-9999}.{0-99}": {}}, "stands for more than"),
        ({"l.{0-1}": {"shape": [8, 12], "rank": 1, "intra": ["a"]}}, "says 1 things of 2 modules"),
        ({"l.{0-1}": {"shape": [8, 12], "rank": 1, "initial": {"A": ["0 1 2", 4]}}}, "says 3 things of 2 modules"),
        ({"l.{0-1}": {"shape": [8, 12], "rank": 1, "initial": {"A": ["0 1"]}}}, "a first draw and a rank"),
        ({"l.{0-1}": 3}, "an object with a shape"),
    ],
)
def test_hostile_columns(modules: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Layout.parse(config(modules), "here")


@pytest.mark.parametrize("name", [f"layers.{'9' * 5000}.up", ".".join(["7"] * 1500), f"{'x' * 5000}.up"])
def test_names_of_hostile_length_are_refused_in_words(tmp_path: Path, name: str) -> None:
    lora = write_lora(tmp_path / "lora", {name: next(iter(random_products().values()))})
    with pytest.raises(InputError, match="a name of "):
        compress(lora, tmp_path / "out", report_html=False)


def test_a_field_that_is_not_known_is_refused_before_anything_is_spread() -> None:
    entry = {"shape": [1, 1], "rank": 1, **{f"x{number}": 1 for number in range(400)}}
    with pytest.raises(InputError, match="which is not known"):
        Layout.parse(config({"l.{0-99999}": entry}), "here")
