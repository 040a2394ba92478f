"""Every option is checked once, by name, value and what is allowed."""

from typing import Any

import pytest

from bslora_convert.errors import RecipeError
from bslora_convert.recipe.recipe import Recipe


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transform": "svd"}, "transform is 'svd': one of ke, gt, ss, none, auto"),
        ({"budget": 0.0}, "budget is 0.0"),
        ({"budget": 1.5}, "0 < budget <= 1"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"budget": True}, "budget is True"),
        ({"max_error": 1.0}, "max_error is 1.0"),
        ({"ranks": (1, 2)}, "ranks is"),
        ({"ranks": (1, -2, 3)}, "ranks is"),
        ({"ranks": (0, 0, 0)}, "at least one part"),
        ({"ranks": (2, 1, 1), "transform": "none"}, "only L,0,0"),
        ({"ranks": (2, 1, 1), "transform": "auto"}, "by name"),
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
        ({"slice": "top-left"}, "no windows"),
        ({"kernel": "2_r", "transform": "ss"}, "no kernels"),
        ({"metric": "two-sided"}, "give calibration"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**options)
    assert words in str(caught.value)


def test_defaults_follow_the_contract() -> None:
    assert Recipe().budget == 0.4459
    assert Recipe().local_ranks == "adaptive"
    assert Recipe().min_shared == 1
    assert Recipe(transform="auto").min_shared == 0
    assert Recipe(ranks=(2, 4, 16)).budget is None
    assert Recipe(ranks=(2, 4, 16)).local_ranks == "uniform"
    assert Recipe(ranks=(2, 4, 16), local_ranks="adaptive").local_ranks == "adaptive"


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


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(RecipeError, match="widths"):
        Recipe.from_dict({"widths": 4})


def test_arguments_say_the_same_as_the_recipe() -> None:
    recipe = Recipe(transform="ss", ranks=(2, 4, 8), slice="top-left", seed=7)
    assert recipe.arguments() == ["--transform", "ss", "--ranks", "2,4,8", "--slice", "top-left", "--seed", "7"]
