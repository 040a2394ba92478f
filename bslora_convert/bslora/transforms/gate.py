"""Gate Transformation (GT): each module puts its own gates before and behind the shared pair.

    shared   B_s (s, r)           A_s (r, s)
    module   d_i (1, in), u_i (s, 1)   the input gate, down and up
             d_o (1, s),  u_o (out, 1) the output gate, down and up
    term     u_o (d_o B_s A_s u_i) d_i = c · u_o d_i

The bracket is one number c, so a gated path is one free rank-one term per module whatever s and r are, and the
shared pair contributes only c. The best GT fit of a matrix with r_local is therefore its truncated SVD of rank
r_local + 2, to the last digit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import linear

from bslora_convert.modules.factors import Factors, Shape, Use

DEFAULT_SIZE = 1024


@dataclass(frozen=True, slots=True)
class Gate:
    """Shared factors of size s."""

    name: ClassVar[str] = "gt"
    own_names: ClassVar[tuple[str, ...]] = ("input_down", "input_up", "output_down", "output_up")
    carrier: ClassVar[str | None] = "output_up"

    size: int = DEFAULT_SIZE

    @property
    def pair_sizes(self) -> Shape:
        """Rows of B_s and columns of A_s."""
        return self.size, self.size

    def own_shapes(self, shape: Shape, kernel_rank: int = 1) -> dict[str, Shape]:
        """Shapes of a module's gates for one shared path."""
        out, width = shape
        return {
            "input_down": (1, width),
            "input_up": (self.size, 1),
            "output_down": (1, self.size),
            "output_up": (out, 1),
        }

    def path_rank(self, pair_rank: int, own: Mapping[str, Tensor]) -> int:
        """Rank of one shared path once expanded."""
        return 1

    def factors(self, pair: Factors, own: Mapping[str, Tensor], shape: Shape) -> Factors:
        """The module's term: c · u_o (out, 1) and d_i (1, in)."""
        c = (own["output_down"] @ pair.b) @ (pair.a @ own["input_up"])
        return Factors(own["output_up"] @ c, own["input_down"])

    def add_(self, y: Tensor, x: Tensor, uses: Sequence[Use]) -> Tensor:
        """Adds the terms, applied to the rows of x (n, in), to y (n, out) in place: rank one each."""
        for pair, own in uses:
            term = self.factors(pair, own, (y.shape[1], x.shape[1]))
            y.addmm_(linear(x, term.a), term.b.T)
        return y
