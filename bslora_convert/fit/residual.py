"""What the rest of a form leaves of a module, as thin products joined by a small core, and the members of a sharing group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.modules.factors import Factors, Shape

Own = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Sum:
    """A matrix held as [b1 b2 …] core [a1; a2; …]: thin products side by side, joined by a small core (q, q).

    The wide factors are never copied together; a truncated SVD of the same products is only another core.
    """

    terms: Sequence[Factors]
    core: Tensor

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return self.terms[0].b.shape[0], self.terms[0].a.shape[1]

    @property
    def transposed(self) -> "Sum":
        """The transposed matrix."""
        return Sum([Factors(term.a.T, term.b.T) for term in self.terms], self.core.T)

    def times(self, x: Tensor) -> Tensor:
        """The matrix times x: (in, c) -> (out, c)."""
        inner = self.core @ torch.cat([term.a @ x for term in self.terms])
        pieces = inner.split([term.rank for term in self.terms])
        out: Tensor = self.terms[0].b @ pieces[0]
        for term, piece in zip(self.terms[1:], pieces[1:], strict=True):
            out.addmm_(term.b, piece)
        return out


@dataclass(frozen=True, slots=True)
class Member:
    """A module of the group: its shape, its kernels so far, and its residual, made when asked for."""

    shape: Shape
    own: Own
    residual: Callable[[], Sum]
