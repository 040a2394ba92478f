"""An update in codes, and A's rows against its random initialisation where that is known.

    B A ≈ B̂ (T̂ A₀ + Δ̂)        T = A A₀ᵀ (A₀ A₀ᵀ)⁻¹, stored as bfloat16        Δ = A − T̂ A₀, in codes as far as it has any

A₀ (r₀, in) costs nothing, as a seed makes it again; T's numbers are counted. Without an initialisation Δ is all of A.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from bslora_convert.baselines.blocks import SCALES, Blocks
from bslora_convert.modules.factors import Factors
from bslora_convert.modules.lowrank import mix_of

MOST = 4.0  # that scales of Δ̂ are multiplied by


@dataclass(frozen=True, slots=True)
class Mix:
    """What rows of A take of its random initialisation: numbers T (k, r₀) bfloat16, base A₀ (r₀, in)."""

    numbers: Tensor
    base: Tensor

    @classmethod
    def of(cls, rows: Tensor, base: Tensor) -> "Mix":
        """The nearest to rows (k, in)."""
        return cls(mix_of(rows, base).to(SCALES), base)

    def decode(self) -> Tensor:
        """T̂ A₀ (k, in), float32."""
        return self.numbers.float() @ self.base


@dataclass(frozen=True, slots=True)
class CodedFactors:
    """An update in codes, its components in parts that are coded apart.

    parts: codes of Bᵀ with those of A, or of Δ beside a mix, of whose rows the last may have none.
    scaling: the configuration's, which no code holds.
    larger: of each part, by what the scales of Δ̂ have to be multiplied so that ⟨Δ, Δ̂⟩ = ‖Δ‖².
    """

    parts: tuple[tuple[Blocks, Blocks], ...]
    scaling: float = 1.0
    mix: Mix | None = None
    larger: tuple[float, ...] = ()

    def factors(self) -> Factors:
        """(out, r), (r, in), float32."""
        b = torch.cat([b.decode() for b, _ in self.parts])
        a = torch.cat([pad(a.decode(), (0, 0, 0, len(b.codes) - len(a.codes))) for b, a in self.parts])
        return Factors(self.scaling * b.T, a if self.mix is None else a + self.mix.decode())

    def times(self, by: float) -> "CodedFactors":
        """The update times a number, which the scales of B take."""
        return replace(self, parts=tuple((b.times(by), a) for b, a in self.parts))

    def in_full(self) -> "CodedFactors":
        """The same with Δ̂ as large as Δ along it, which its scales take; nothing is changed where there is no mix."""
        if self.mix is None:
            return self
        pairs = zip(self.parts, self.larger, strict=True)
        return replace(self, parts=tuple((b, a.times(by)) for (b, a), by in pairs))

    @property
    def numbers(self) -> int:
        """Those that are stored, T's among them."""
        codes = sum(b.codes.numel() + a.codes.numel() for b, a in self.parts)
        return codes + (0 if self.mix is None else self.mix.numbers.numel())

    @property
    def bytes(self) -> int:
        """Bytes of what is stored."""
        codes = sum(b.bytes + a.bytes for b, a in self.parts)
        return codes + (0 if self.mix is None else self.mix.numbers.nbytes)


def larger(rest: Tensor, codes: Blocks) -> float:
    """By which scales are multiplied so that what codes decode to is as large as `rest` (k, in) along it."""
    along = float((rest.double() * codes.decode().double()).sum())
    return min(float(rest.double().square().sum()) / along, MOST) if along > 0 else 1.0
