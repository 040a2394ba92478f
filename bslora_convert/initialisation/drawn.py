"""What PEFT draws for an adapted module, in 32-bit outputs of the generator, one module after the other.

    linear       nn.Linear(in, r)  r in,   nn.Linear(r, out)  out r [+ out with lora_bias],   kaiming_uniform_  r in:   A₀
    embedding    randn(r, V),   randn(out, r),   normal_(out, r):   B₀, and A₀ = 0                     from PEFT 0.6 on
    normal       one output a number; 16 more where their count is no multiple of 16; below 16 numbers four outputs a pair

So A₀ stands r in + out r outputs after a module's own beginning. Earlier versions drew the base's own weight again, before this:
PEFT 0.3 and 0.4 twice (the constructor and reset_parameters of nn.Linear), their bitsandbytes variants once. Convolutions draw
like linear modules with `in` times the kernel's size; GPT-2's Conv1D and stacked experts (r times experts) like linear modules.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Module:
    """An adapted module as it is stored.

    a: (r, in), any float dtype; of an embedding (r, V), which is zeros at first: no draw to be found, but draws to be passed.
    out: rows of B.
    """

    a: Tensor
    out: int
    kind: Literal["linear", "embedding"] = "linear"

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    @property
    def width(self) -> int:
        """Columns of A."""
        return self.a.shape[1]

    @property
    def size(self) -> int:
        """Numbers of A."""
        return self.rank * self.width

    @property
    def lead(self) -> int:
        """Outputs between a linear module's own beginning and A₀."""
        return self.size + self.out * self.rank


FORMS = 6  # ways in which versions and options of PEFT add to a linear module's outputs


def added(module: Module, form: int) -> int:
    """Outputs drawn for a linear module before A₀ beside its lead, in one of the forms; the first is none."""
    weight = module.width * module.out
    return (0, module.out, 2 * weight, 2 * (weight + module.out), weight, weight + module.out)[form]


def passed(embedding: Module) -> Iterator[int]:
    """Outputs drawn for an embedding: now, and by PEFT 0.3 and 0.4."""
    b = normal(embedding.out * embedding.rank)
    yield normal(embedding.size) + 2 * b
    yield 2 * normal(embedding.width * embedding.out) + b


def normal(count: int) -> int:
    """Outputs that torch takes for `count` normal numbers of float32 on a CPU."""
    if count < 16:
        return 4 * ((count + 1) // 2)
    return count + (16 if count % 16 else 0)
