"""How a shared factor takes a module's shape: three transforms behind one small protocol."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from bslora_convert.bslora.transforms.gate import Gate
from bslora_convert.bslora.transforms.kronecker import Kronecker
from bslora_convert.bslora.transforms.slice import Slice
from bslora_convert.modules.factors import Factors, Shape, Use


class Transform(Protocol):
    """What the form, its storage and its expansion need to know of a transform."""

    @property
    def name(self) -> str:
        """Short name: `ss`, `gt` or `ke`."""

    @property
    def own_names(self) -> tuple[str, ...]:
        """Names of the tensors that a module keeps for each shared path."""

    @property
    def carrier(self) -> str | None:
        """The one of these that a path's whole term is linear in, None where a module keeps nothing."""

    @property
    def pair_sizes(self) -> Shape:
        """Rows of a shared B_s and columns of a shared A_s."""

    def own_shapes(self, shape: Shape, kernel_rank: int) -> dict[str, Shape]:
        """Shapes of the tensors that a module of `shape` keeps for one shared path."""

    def path_rank(self, pair_rank: int, own: Mapping[str, Tensor]) -> int:
        """Rank of one shared path once expanded."""

    def factors(self, pair: Factors, own: Mapping[str, Tensor], shape: Shape) -> Factors:
        """A module's term of a shared path, as factors of the module's shape."""

    def add_(self, y: Tensor, x: Tensor, uses: Sequence[Use]) -> Tensor:
        """Adds the terms of shared paths, applied to the rows of x (n, in) and never expanded, to y (n, out) in place."""


TRANSFORMS = {"ss": Slice, "gt": Gate, "ke": Kronecker}

__all__ = ["TRANSFORMS", "Gate", "Kronecker", "Slice", "Transform"]
