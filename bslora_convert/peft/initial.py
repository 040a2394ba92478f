"""Where training starts: A random, B zero, so that a new adapter changes nothing; kernels and gates random or ones.

    A                normal: N(0, 1/n)                                   kaiming_uniform: U(±1/√n)
    kernels, gates   kaiming_normal: N(0, 1/3n)   kaiming_uniform: U(±1/√n)   ones

n is the length of a tensor's rows. The paper draws A from a normal distribution and tries these three for kernels and gates; the
code that its authors released takes U(±1/√n), Kaiming's with a = √5, for all of them. The paper gives no deviation: A's here
keeps the size of what it maps, that of kernels and gates is the uniform draw's.
"""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bslora_convert.bslora.layout import Layout
from bslora_convert.initialisation.kept import draws_at
from bslora_convert.initialisation.stream import HALF, SEEDS, Place
from bslora_convert.modules.factors import Shape
from bslora_convert.recipe.checks import check_choice, check_whole

Draw = Callable[..., Any]  # fills a tensor in place

LIKE_LINEAR = 5**0.5  # Kaiming's a under which the uniform draw is that of torch's linear layers


def _normal(tensor: Tensor, generator: torch.Generator | None = None) -> None:
    nn.init.normal_(tensor, std=tensor.shape[1] ** -0.5, generator=generator)


def _ones(tensor: Tensor, generator: torch.Generator | None = None) -> None:
    nn.init.ones_(tensor)


UNIFORM: Draw = partial(nn.init.kaiming_uniform_, a=LIKE_LINEAR)
FOR_A: dict[str, Draw] = {"normal": _normal, "kaiming_uniform": UNIFORM}
FOR_OWN: dict[str, Draw] = {
    "kaiming_normal": partial(nn.init.kaiming_normal_, a=LIKE_LINEAR),
    "kaiming_uniform": UNIFORM,
    "ones": _ones,
}


@dataclass(frozen=True, slots=True)
class Init:
    """How the tensors of a new adapter are drawn.

    own: kernels and gates. a: A, of local and shared parts. seed: the numbers follow from it and the tensors' names alone; where
    None they come from torch's generator, as PEFT's do, so that `set_seed` decides. Uniform local A's of a seed are draws of
    `initialisation.stream`, one module after the other, and the adapter's configuration records them: codes need no search.

    places: of these draws, which `placed` gives.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    own: str = "kaiming_normal"
    a: str = "normal"
    seed: int | None = None
    places: Mapping[str, Place] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("init", self.own, FOR_OWN)
        check_choice("init.a", self.a, FOR_A)
        check_whole("init.seed", self.seed, 0, (1 << 63) - 1)

    @classmethod
    def of(cls, value: "Init | str") -> "Init":
        """The value itself, or what draws kernels and gates as a name says.

        :raises RecipeError: when it is neither.
        """
        return value if isinstance(value, Init) else cls(value)

    def placed(self, layout: Layout) -> "Init":
        """With the places of local A's that are draws of its seed, in the order of the layout; itself where none are."""
        if self.seed is None or FOR_A[self.a] is not UNIFORM:
            return self
        places, first = {}, 0
        for name, entry in layout.modules.items():
            if entry.rank and entry.kind == "linear":
                places[name], first = Place(first, entry.rank), first + entry.rank * entry.shape[1]
        return replace(self, places=places)

    @property
    def record(self) -> dict[str, Any] | None:
        """What a configuration says of the draws."""
        if not self.places or self.seed is None:
            return None
        return {
            "seed": self.seed % SEEDS,
            "places": {name: list(astuple(place)) for name, place in self.places.items()},
        }

    def numbers(self, module: str, name: str, shape: Shape) -> Tensor:
        """A tensor of the format (`local_A`, `intra_own_B`) of a module, float32 on the CPU whatever the model is on."""
        if name == "local_A" and module in self.places and self.seed is not None:
            place = self.places[module]
            (found,), _ = draws_at(self.seed % SEEDS, [(place.first, place.rank * shape[1])])
            drawn: Tensor = torch.from_numpy(found.astype(np.float32)).view(shape) / (HALF * shape[1] ** 0.5)
            return drawn
        tensor = torch.zeros(shape)
        part, _, own = name.partition("_own_")
        draw = FOR_OWN[self.own] if own else FOR_A[self.a] if part.endswith("_A") else None
        if draw is not None and tensor.numel():
            generator = None
            if self.seed is not None:
                mixed = blake2b(f"{self.seed} {module} {name}".encode(), digest_size=8).digest()
                generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big"))
            draw(tensor, generator=generator)
        return tensor
