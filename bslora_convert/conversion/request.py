"""What a conversion is asked for, resolved for its source, and what it gives."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor

from bslora_convert.bslora.form import BsloraForm
from bslora_convert.errors import RecipeError
from bslora_convert.initialisation.initial import Initial
from bslora_convert.layers.slots import step_of
from bslora_convert.lora import LoraAdapter
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.recipe.structure import Structure
from bslora_convert.recipe.target import Target


@dataclass(frozen=True, slots=True)
class Request:
    """structure, target: of the recipe, for this source. dtype: of the numbers that readers get. seed: of random starts.

    carried: whole weights that travel along; they take bytes of the file. source_bytes: of the source's file. source_dtype: of
    most of its numbers.
    """

    structure: Structure
    target: Target
    dtype: torch.dtype
    seed: int = 0
    carried: Mapping[str, Tensor] = field(default_factory=dict)
    source_bytes: int = 0
    source_dtype: torch.dtype = torch.float32

    @classmethod
    def of(cls, recipe: Recipe, adapter: LoraAdapter) -> Self:
        """What a recipe asks for, of one adapter."""
        modules, size = adapter.modules.values(), adapter.weights.stat().st_size
        slot = step_of(max(module.rank for module in modules))
        whole = sum(tensor.nbytes for tensor in adapter.carried.values())
        rest = size if not whole else sum(module.b.nbytes + module.a.nbytes for module in modules)
        structure, target = recipe.resolved(sum(module.rank * sum(module.shape) for module in modules), rest, slot)
        if target.bytes is not None:
            target = replace(target, bytes=target.bytes + whole)  # whole weights can't be compressed
        dtype = adapter.dtype if recipe.storage.dtype == "auto" else getattr(torch, recipe.storage.dtype)
        return cls(structure, target, dtype, recipe.seed, adapter.carried, size, adapter.dtype)

    def of_bytes(self, size: int) -> Self:
        """The same for a file of so many bytes."""
        return replace(self, target=self.target.of_bytes(size))


@dataclass(frozen=True, slots=True)
class Converted:
    """A form as it is stored: in its storage dtype, with the codes that it was decoded from, as its file has them, if any.

    error: its relative error, where one was the target; None otherwise. initial: the random initialisation that the codes are
    against, if any.
    """

    form: BsloraForm
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: float | None = None
    initial: Initial | None = None


def cast(form: BsloraForm, dtype: torch.dtype) -> BsloraForm:
    """The form in its storage dtype.

    :raises RecipeError: when a number is too large for it.
    """
    stored = form.to(dtype)
    if dtype == torch.float16 and not all(bool(tensor.isfinite().all()) for tensor in stored.tensors()):
        raise RecipeError("dtype float16 can't hold some of the numbers; bfloat16 and float32 can", "dtype")
    return stored
