"""Every option is checked once, by name, value and what is allowed."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bslora_convert.cli import main
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.recipe.files import call, merged, read_options, to_toml
from bslora_convert.recipe.recipe import Recipe
from tests.planting import random_products, write_lora


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transform": "svd"}, "transform is 'svd': one of auto, ke, gt, ss, none"),
        ({"budget": 0.0}, "budget is 0.0"),
        ({"budget": 1.5}, "0 < budget <= 1"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"budget": True}, "budget is True"),
        ({"max_error": 1.0}, "max_error is 1.0"),
        ({"ranks": (1, 2)}, "ranks is"),
        ({"ranks": (1, -2, 3)}, "ranks is"),
        ({"ranks": (0, 0, 0)}, "at least one part"),
        ({"ranks": (2, 1, 1), "transform": "none"}, "only L,0,0"),
        ({"max_kl": 0.0}, "max_kl is 0.0"),
        ({"max_kl": float("inf")}, "max_kl is inf"),
        ({"min_retention": 1.0}, "min_retention is 1.0"),
        ({"min_agreement": 0.9, "bytes": 0.1}, "exclude each other"),
        ({"ranks": (2, 1, 1), "budget": 0.3}, "exclude each other"),
        ({"budget": 0.3, "max_error": 0.3}, "exclude each other"),
        ({"slice": "middle"}, "slice is 'middle'"),
        ({"kernel": "r_2"}, "kernel is 'r_2'"),
        ({"local_ranks": "some"}, "local_ranks is 'some'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"device": "cpu:1"}, "device is 'cpu:1'"),
        ({"seed": -1}, "seed is -1"),
        ({"min_shared": 1.5}, "min_shared is 1.5"),
        ({"shared_size": 0}, "shared_size is 0"),
        ({"shared_size": 64, "transform": "ss"}, "no meaning"),
        ({"slice": "top-left", "transform": "ke"}, "no windows"),
        ({"kernel": "2_r", "transform": "ss"}, "no kernels"),
        ({"metric": "two-sided"}, "needs prompts"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**options)
    assert words in str(caught.value)


def test_defaults_follow_the_contract() -> None:
    assert Recipe().asked.max_error == 0.1
    assert not Recipe().asked.is_given
    assert Recipe(max_error=0.1).asked.is_given
    assert Recipe().options()["max_error"] is None
    assert Recipe().structure.transform == "auto"
    assert Recipe().structure.max_rank == "slot"
    assert Recipe().structure.local_ranks == "adaptive"
    assert Recipe().structure.min_shared == 0
    assert Recipe(transform="ke").structure.min_shared == 1
    by_hand = Recipe(ranks=(2, 4, 16))
    assert by_hand.asked.max_error is None
    assert by_hand.structure.max_rank == "none"
    assert by_hand.structure.local_ranks == "uniform"
    assert Recipe(ranks=(2, 4, 16), local_ranks="adaptive").structure.local_ranks == "adaptive"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(),
        Recipe(transform="ss", ranks=(2, 4, 8), slice="top-left", seed=7),
        Recipe(transform="none", max_error=0.1, dtype="float32"),
        Recipe(transform="auto", budget=0.25, min_shared=1),
    ],
)
def test_to_dict_and_back(recipe: Recipe) -> None:
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_a_file_says_what_the_command_line_says(tmp_path: Path) -> None:
    recipe = Recipe(transform="none", bytes=0.25, dtype="float32", seed=3)
    toml, plain, result = (tmp_path / name for name in ("recipe.toml", "recipe.json", "fidelity.json"))
    toml.write_text(to_toml(recipe.given()))
    assert 'transform = "none"' in toml.read_text()
    plain.write_text(json.dumps({"transform": "none", "bytes": 0.25, "dtype": "float32", "seed": 3}))
    result.write_text(
        json.dumps({"tool_version": "0", "recipe": recipe.to_dict(), "training": {"options": {"epochs": 2.0}}})
    )
    for path in (toml, plain, result):
        values = read_options(path)
        assert values.pop("epochs", 2.0) == 2.0
        assert Recipe(**values) == recipe
    ranks = Recipe(ranks=(2, 4, 8))
    toml.write_text(to_toml(ranks.given()))
    assert Recipe(**read_options(toml)) == ranks


def test_what_is_given_beside_a_file_comes_first() -> None:
    file = {"bytes": 0.25, "seed": 3, "transform": "none"}
    assert merged(file, {"seed": 5}) == {"bytes": 0.25, "seed": 5, "transform": "none"}
    assert merged(file, {"budget": 0.5}) == {"budget": 0.5, "seed": 3, "transform": "none"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.toml", "transform = ", "not valid TOML"),
        ("a.json", "[1]", "a JSON object is expected"),
        ("a.toml", 'spline = "x"', "spline is no option"),
        ("a.toml", "", "the file is empty"),
        ("nowhere/a.toml", None, "no such file"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((InputError, RecipeError), match=words):
        read_options(tmp_path / name)


def test_the_command_line_takes_a_file(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=1))
    (tmp_path / "recipe.toml").write_text('transform = "none"\nbudget = 0.5\nseed = 4\n')
    words = ["compress", str(lora), str(tmp_path / "out"), "--recipe", str(tmp_path / "recipe.toml"), "--json"]
    done = CliRunner().invoke(main, [*words, "--seed", "6"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)["recipe"]
    assert (said["transform"], said["budget"], said["seed"]) == ("none", 0.5, 6)
    words[2:5] = [str(tmp_path / "again"), "--recipe", str(tmp_path / "out" / "fidelity.json")]
    again = CliRunner().invoke(main, words)
    assert json.loads(again.stdout)["recipe"] == said
    (tmp_path / "library").mkdir()
    lora.rename(tmp_path / "library" / "a")
    many = CliRunner().invoke(
        main, ["batch", str(tmp_path / "library"), str(tmp_path / "many"), "--workers", "0", *words[3:5], "--json"]
    )
    assert json.loads(many.stdout)["ok"] == 1


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(RecipeError, match="widths"):
        Recipe.from_dict({"widths": 4})


def test_arguments_say_the_same_as_the_recipe() -> None:
    recipe = Recipe(transform="ss", ranks=(2, 4, 8), slice="top-left", seed=7)
    assert call(recipe.given()) == (
        ["--transform", "ss", "--ranks", "2,4,8", "--seed", "7"],
        {"slice": "top-left"},  # which has no flag
    )
