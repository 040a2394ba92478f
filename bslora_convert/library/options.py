"""The recipe of one adapter: the library's, with the prompts and the base model that its row of the manifest names.

prompts      in the place of each prompt file that the recipe names; where it names none, to fit in their metric
base_model   in the place of the recipe's, wherever the conversion runs a base model
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bslora_convert.behaviour.prompts import read_prompts
from bslora_convert.errors import RecipeError
from bslora_convert.files.hashing import sha256
from bslora_convert.library.items import Item
from bslora_convert.recipe.recipe import Recipe

FIT, DISTIL, BASE = "prompts", "finetune", "base_model"  # the recipe's fields
PROMPTS = (FIT, DISTIL)


def recipe_of(item: Item, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe by which an adapter is converted.

    :raises RecipeError: when it has prompts and nobody says on which base model they are to be run, or a behaviour is aimed at
        and it has no prompts.
    """
    own = dict(recipe)
    if item.prompts is not None:
        named = [name for name in PROMPTS if isinstance(recipe.get(name), str)]
        own |= dict.fromkeys(named or [FIT], item.prompts)
    if item.base_model is not None and any(own.get(name) is not None for name in PROMPTS):
        own[BASE] = item.base_model
    if item.prompts is not None and own.get(BASE) is None:
        raise RecipeError(f"{item.id}: it has prompts and no base model; give base_model in the manifest")
    Recipe.from_dict(own).check_target()
    return own


def own_options(item: Item, hash_of: Callable[[str], str]) -> str:
    """What of an adapter's own options its result depends on; empty where it has none.

    hash_of: `prompts_hash`, or a cache of it.
    """
    prompts = f"prompts {hash_of(item.prompts)}" if item.prompts is not None else ""
    base = f"base_model {item.base_model}" if item.base_model is not None else ""
    return " ".join(filter(None, (prompts, base)))


def prompts_hash(path: str) -> str:
    """SHA-256 of a prompt file.

    :raises InputError: when it is missing or damaged.
    """
    read_prompts(path)
    return sha256(Path(path))
