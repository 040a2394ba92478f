"""An adapter in the authors' layout as the source of a conversion: it is in BSLoRA form already, so nothing is fitted.

Their files repeat the shared tensors under every module. The conversion keeps each once, number by number; what is measured
against is the plain LoRA that equals the adapter.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.official import OfficialAdapter, load_official
from bslora_convert.conversion.request import Converted, cast
from bslora_convert.conversion.writing import Extras
from bslora_convert.errors import RecipeError
from bslora_convert.lora import LoraAdapter, LoraModule
from bslora_convert.lora.config import LoraConfig
from bslora_convert.recipe.files import spelled
from bslora_convert.recipe.recipe import Recipe

OF_A_FIT = ("transform", "budget", "ranks", "shared_size", "slice", "kernel", "gain")  # options without effect here
NEEDING_A_LORA = ("prompts", "finetune")


@dataclass(frozen=True, slots=True)
class OfficialSource(LoraAdapter):
    """An official adapter as the LoRA that equals it; numbers and dtype are those of its file."""

    official: OfficialAdapter = field(kw_only=True)

    @property
    def form(self) -> BsloraForm:
        """The form as it was found."""
        return self.official.form

    @property
    def parameters(self) -> int:
        """Numbers in the file, every copy counted."""
        return self.official.stored

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the file, not of the expansion."""
        return self.official.dtype


def load_source(path: str | Path, recipe: Recipe) -> OfficialSource:
    """Reads an adapter in the authors' layout.

    :raises InputError: as `load_official`. :raises Refused: likewise.
    :raises RecipeError: when the recipe asks for a fit on a base model.
    """
    for name in NEEDING_A_LORA:
        if recipe.options()[name] is not None:
            raise RecipeError(
                f"{name}: {path} is in the authors' BSLoRA layout and is converted without a fit; "
                "`expand` it to a LoRA first and compress that",
                name,
            )
    official = load_official(path)
    form = official.form
    modules = {}
    for name, module in form.modules.items():
        delta = form.delta(name)
        modules[name] = LoraModule(delta.b, delta.a, 1.0, module.kind)
    rank = max(module.rank for module in modules.values())
    config = LoraConfig(official.inherited, rank, float(rank), False, {}, {})
    return OfficialSource(official.path, official.weights, config, modules, {}, official.notes, official=official)


def as_found(source: OfficialSource, recipe: Recipe) -> tuple[Converted, Recipe, Extras]:
    """The form as it is in place of a fit, a recipe that says so (transform and ranks as they were found), and the record."""
    form = source.form
    assert form.transform is not None  # the authors' layout always shares
    local = next(iter(form.modules.values())).local.rank  # theirs is one for all modules
    ranks = (local, form.shared_rank("intra"), form.shared_rank("inter"))
    used = Recipe(
        transform=form.transform.name, ranks=ranks, dtype=recipe.storage.dtype, device=recipe.device, seed=recipe.seed
    )
    note = "the source is in BSLoRA form already: each of its tensors is kept once, and nothing is fitted"
    said, usual = recipe.options(), Recipe().options()
    given = [name for name in OF_A_FIT if said[name] not in (None, usual[name])]
    if given:
        note += f"; without effect: {', '.join(map(spelled, given))}"
    official = source.official
    record = {"stored_parameters": official.stored, "copied_parameters": official.copied}
    dtype = source.dtype if recipe.storage.dtype == "auto" else getattr(torch, recipe.storage.dtype)
    return Converted(cast(form, dtype), notes=(note,)), used, Extras(deduplication=record)
