"""Where training starts: A random, B zero, so that a new adapter changes nothing; kernels and gates random or ones.

    A                normal: N(0, 1/n)                                   kaiming_uniform: U(±1/√n)
    kernels, gates   kaiming_normal: N(0, 1/3n)   kaiming_uniform: U(±1/√n)   ones

n is the length of a tensor's rows. The paper draws A from a normal distribution and tries these three for kernels and gates; the
code that its authors released takes U(±1/√n), Kaiming's with a = √5, for all of them. The paper gives no deviation: A's here
keeps the size of what it maps, that of kernels and gates is the uniform draw's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn

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
    None they come from torch's generator, as PEFT's do, so that `set_seed` decides.

    :raises RecipeError: naming the field, its value and what is allowed.
    """

    own: str = "kaiming_normal"
    a: str = "normal"
    seed: int | None = None

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

    def numbers(self, module: str, name: str, shape: Shape) -> Tensor:
        """A tensor of the format (`local_A`, `intra_own_B`) of a module, float32 on the CPU whatever the model is on."""
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
