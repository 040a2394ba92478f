"""Every option is declared once, by the field that it fills: as a flag, or in the recipe's file."""

import json
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from bslora_convert.cli import main
from bslora_convert.library.engines import ENGINES
from bslora_convert.recipe.analyzing import AnalyzeOptions
from bslora_convert.recipe.batching import ENGINE_NAMES, BatchOptions
from bslora_convert.recipe.comparing import CompareOptions
from bslora_convert.recipe.expanding import ExpandOptions
from bslora_convert.recipe.files import DESCRIBED, read_options
from bslora_convert.recipe.finetuning import FinetuneOptions
from bslora_convert.recipe.options import SECTIONS, flag_of, options_of
from bslora_convert.recipe.output import OutputOptions
from bslora_convert.recipe.reading import Reading
from bslora_convert.recipe.recipe import RECIPE_PARTS, Recipe
from bslora_convert.recipe.training import OPTIONS, Training
from bslora_convert.recipe.verifying import VerifyOptions
from bslora_convert.verbs.compress import compress
from tests.planting import random_products, write_lora
from tests.recipes import by_file

TAKEN = {  # verb -> the dataclasses that its options fill
    "compress": (*RECIPE_PARTS.values(), Recipe, Training, OutputOptions),
    "batch": (*RECIPE_PARTS.values(), Recipe, Training, BatchOptions),
    "finetune": (Training, FinetuneOptions),
    "verify": (VerifyOptions,),
    "compare": (CompareOptions,),
    "analyze": (AnalyzeOptions,),
    "expand": (ExpandOptions,),
    "inspect": (Reading,),
}
FILE_ONLY = {
    "min_shared", "shared_size", "slice", "kernel", "local_ranks", "groups", "epochs", "batch_size", "accumulate", "temperature",
    "hidden_weight", "max_length", "evaluate_every", "patience",
}  # fmt: skip


def flags(verb: str) -> dict[str, click.Option]:
    return {param.name: param for param in main.commands[verb].params if isinstance(param, click.Option) and param.name}


@pytest.mark.parametrize("verb", TAKEN)
def test_every_field_is_a_flag_or_in_the_recipes_file(verb: str) -> None:
    for kind in TAKEN[verb]:
        for field in fields(kind):
            if not field.init or field.name in RECIPE_PARTS:
                continue
            assert field.name in flags(verb) or field.name in DESCRIBED, f"{kind.__name__}.{field.name}"


def test_what_only_an_expert_decides_has_no_flag_of_compress() -> None:
    for verb in ("compress", "batch"):
        assert not FILE_ONLY & set(flags(verb))
    assert set(DESCRIBED) >= FILE_ONLY


@pytest.mark.parametrize("verb", main.commands)
def test_help_groups_options_and_says_what_each_does(verb: str) -> None:
    shown = CliRunner().invoke(main, [verb, "--help"]).stdout
    if verb in TAKEN:
        places = [shown.index(f"\n{title}:") for title in SECTIONS if f"\n{title}:" in shown]
        assert len(places) > 1
        assert places == sorted(places)
        assert "\nOptions:" not in shown
    for option in flags(verb).values():
        assert option.help, option.name
        assert len(option.help) < 160, option.name


def test_the_printed_file_gives_the_defaults(tmp_path: Path) -> None:
    printed = CliRunner().invoke(main, ["recipe"])
    assert printed.exit_code == 0
    (tmp_path / "recipe.toml").write_text(printed.stdout)
    values = read_options(tmp_path / "recipe.toml")
    settings = {name: values.pop(name) for name in OPTIONS if name in values}
    assert Recipe(**values) == Recipe()
    assert Training(**settings) == Training()
    for name in DESCRIBED:
        assert f"{flag_of(name).removeprefix('--')} =" in printed.stdout


def test_the_options_as_an_object() -> None:
    said = json.loads(CliRunner().invoke(main, ["recipe", "--json"]).stdout)
    assert said["slice"]["flag"] is None
    assert said["max-error"]["flag"] == "--max-error"
    assert said["transform"]["default"] == "auto"
    assert "ke" in said["transform"]["choices"]


@pytest.mark.parametrize("option", ["--slice", "--min-shared", "--batch-size", "--hidden-weight"])
@pytest.mark.parametrize("verb", ["compress", "batch"])
def test_an_option_of_the_file_alone_is_wrong_use_that_names_the_file(verb: str, option: str) -> None:
    done = CliRunner().invoke(main, [verb, "lora", "out", option, "1"])
    assert done.exit_code == 2
    assert f"{option} is an option of the recipe file: write `{option.removeprefix('--')} = …`" in done.stderr
    unknown = CliRunner().invoke(main, [verb, "lora", "out", "--slices", "1"])
    assert "No such option" in unknown.stderr


def test_a_wrong_value_of_a_file_is_named(tmp_path: Path) -> None:
    for value, said in (({"slice": "middle"}, "slice is 'middle'"), ({"batch_size": 0}, "batch_size is 0")):
        done = CliRunner().invoke(main, ["compress", "lora", "out", *by_file(tmp_path / "recipe.toml", **value)])
        assert done.exit_code == 2
        assert said in done.stderr


def test_the_names_of_engines_are_those_of_the_engines() -> None:
    assert set(ENGINE_NAMES) == set(ENGINES)


def test_no_option_stands_in_two_places_of_a_recipe() -> None:
    named = [name for kind in (*RECIPE_PARTS.values(), Recipe, Training) for name in options_of(kind)]
    assert sorted({name for name in named if named.count(name) > 1}) == ["seed"]


def test_a_card_shows_the_options_that_no_flag_says(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(layers=2))
    compress(lora, tmp_path / "out", Recipe(transform="ss", budget=0.5, slice="top-left"), report_html=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "--transform ss --budget 0.5 --recipe recipe.toml\n" in card
    assert '\nslice = "top-left"\n' in card
    compress(lora, tmp_path / "plain", Recipe(transform="ss", budget=0.5), report_html=False)
    assert "recipe.toml" not in (tmp_path / "plain" / "README.md").read_text()


@pytest.mark.parametrize(
    "text",
    ["epochs = 'x'", "learning-rate = '3'", "batch-size = 1.5", "chat-template = 'no'", "groups = 3", "patience = true",
     "max-steps = 2.5", "heldout = 'half'"],
)  # fmt: skip
def test_a_wrong_type_in_a_recipe_file_is_named(tmp_path: Path, text: str) -> None:
    lora, file = write_lora(tmp_path / "lora", random_products(layers=1)), tmp_path / "recipe.toml"
    file.write_text(text + "\n")
    done = CliRunner().invoke(main, ["compress", str(lora), str(tmp_path / "out"), "--recipe", str(file)])
    assert done.exit_code == 2, done.output
    assert text.partition(" ")[0] in done.stderr.replace("_", "-")
    assert "internal error" not in done.stderr
