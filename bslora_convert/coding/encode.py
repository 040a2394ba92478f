"""Vectors into codes: the best way through the trellis, the scale of each group, the product of two coded sides refitted.

Numbers of a vector x, over the root mean square of their group, are about normal ones of unit variance, for which the trellis's
tables were made. `viterbi` finds the values t of least ‖x / rms − t‖²; the scale that is stored for them is, group by group,

    s = ⟨x, t⟩ / ‖t‖²        so that   ‖x − x̂‖² = ‖x‖² − ‖x̂‖²

A component σ u vᵀ stands balanced, √σ on each side. With each side's lost share D (of ‖x‖²) its product loses

    ‖σ u vᵀ − û v̂ᵀ‖² = σ² (1 − (1 − D_u)(1 − D_v))                     by the identity above

Fit of a module's local part T ≈ B A (out, r)(r, in) at given widths, each number coded once:

    B̂ = coded(B)        A = (B̂ᵀB̂)⁻¹ B̂ᵀT        Â = diag(c) coded(A)
    c: the r lengths of least error,  (B̂ᵀB̂ ∘ ÂÂᵀ) c = diag(B̂ᵀTÂᵀ)  with Â = coded(A)

so that each row of A is fitted to what all coded columns of B left, and the errors of coding don't add up blindly. In a metric
(`metric`) lengths are those of weighed vectors, and A = (B̂ᵀΓB̂)⁻¹ B̂ᵀΓT.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from bslora_convert.bslora.codes.coded import GROUP, SCALES, Coded, groups_of, spread
from bslora_convert.bslora.codes.trellis import TRELLIS_WIDTHS, tables, windows_of
from bslora_convert.bslora.codes.widths import NONE, WIDTHS
from bslora_convert.bslora.layout import MIX
from bslora_convert.coding.viterbi import paths, paths_on_device
from bslora_convert.coding.widths import Side, Widths
from bslora_convert.metric.metric import PLAIN, Metric, Weigh, as_it_is
from bslora_convert.modules.factors import Factors
from bslora_convert.modules.lowrank import Grams, mix_of, residual_energy

SMALLEST_SCALE = 1e-30
SMALLEST_NORM = 1e-300
DISTORTIONS = {
    1: 0.2715,
    2: 0.0718,
    3: 0.01892,
    4: 0.00499,
    5: 0.00132,
    6: 0.000349,
    7: 9.7e-5,
    8: 2.9e-5,
    16: 2.7e-6,
}  # of the energy of a long normal vector: `python benchmarks/entropy.py`, less what BEGINNING adds
BEGINNING = 8  # numbers' worth of it that the beginning of a vector adds
PROBES, PROBE_SEED = 8, 0


@dataclass(frozen=True, slots=True)
class Encoded:
    """Codes, and what they stand for before scales, (n, L) float32; nothing for vectors of 16 bits."""

    coded: Coded
    values: Tensor

    def scaled(self, by: float | Tensor) -> "Encoded":
        """As of `Coded`."""
        return replace(self, coded=self.coded.scaled(by))

    def decode(self) -> Tensor:
        """(n, L) float32: what the codes decode to."""
        found = self.values * spread(self.coded.scales, self.values.shape[1])
        if self.coded.exact is not None:
            found = torch.where((self.coded.widths == 16)[:, None], self.coded.exact.float(), found)
        return found


def encode(
    vectors: Tensor, widths: Sequence[int], like: Tensor | None = None, unbiased: bool | Tensor = False
) -> Encoded:
    """(n, L) vectors, one width each.

    like: scales (n, groups) that may fit better than those of the vectors' own size: of codes that they were decoded from.
    unbiased: whether a vector's scales are such that ⟨x, x̂⟩ = ‖x‖² instead of least error; a tensor (n,) says it of each.

    :raises ValueError: for a width that is neither one of WIDTHS nor none.
    """
    n, length = vectors.shape
    vectors = vectors.float()
    named = torch.tensor(widths, dtype=torch.uint8)
    codes = torch.zeros(n, length, dtype=torch.uint8)
    scales = torch.zeros(n, groups_of(length), dtype=SCALES)
    values = torch.zeros(n, length)
    exact = None
    whole = torch.as_tensor(unbiased).expand(n)
    for width in sorted(set(widths)):
        if width == NONE:
            continue
        if width not in WIDTHS:
            raise ValueError(f"width {width}: one of {NONE, *WIDTHS} is allowed")
        chosen = named == width
        own = vectors[chosen.to(vectors.device)]
        if width == 16:
            exact = torch.zeros(n, length, dtype=SCALES)
            exact[chosen] = own.cpu().to(SCALES)
            continue
        groups = _Groups.of(own)
        found = groups.searched(groups.rms(), width)
        if like is not None:
            found = groups.better(found, groups.searched(like[chosen].float(), width), width)
        codes[chosen] = found
        levels = groups.values(found, width)
        scales[chosen] = groups.scales(levels, whole[chosen])
        values[chosen] = levels.view(len(own), -1)[:, :length]
    return Encoded(Coded(named, codes, scales, exact), values)


@dataclass(frozen=True, slots=True)
class _Groups:
    """Vectors (n, L) of one width, on the CPU and where they came from, and their numbers by group, zeros behind the last."""

    vectors: Tensor
    held: Tensor
    cut: Tensor

    @classmethod
    def of(cls, held: Tensor) -> "_Groups":
        vectors = held.cpu()
        length = vectors.shape[1]
        return cls(vectors, held, _cut(vectors, length))

    def rms(self) -> Tensor:
        """(n, groups)."""
        length = self.vectors.shape[1]
        counted = torch.full((self.cut.shape[1],), float(self.cut.shape[2]))
        counted[-1] = length - (self.cut.shape[1] - 1) * self.cut.shape[2]
        return (self.cut.square().sum(2) / counted).sqrt()

    def searched(self, scales: Tensor, width: int) -> Tensor:
        """Codes of the best way through the trellis under these scales."""
        length, table = self.vectors.shape[1], tables()[width]
        spread_scales = spread(scales.clamp_min(SMALLEST_SCALE), length)
        if self.held.is_cuda:
            return paths_on_device(self.held / spread_scales.to(self.held.device), table, width)
        return torch.from_numpy(paths((self.vectors / spread_scales).numpy(), table.numpy(), width))

    def values(self, codes: Tensor, width: int) -> Tensor:
        """What the codes stand for before scales, by group."""
        return _cut(tables()[width][windows_of(codes, width)], codes.shape[1])

    def scales(self, values: Tensor, unbiased: Tensor | None = None) -> Tensor:
        """Those of least error, or with which a vector is unbiased, rounded as they are stored. unbiased (n,): which are."""
        cross = (self.cut * values).sum(2)
        found = cross / values.square().sum(2).clamp_min(SMALLEST_NORM)
        if unbiased is not None:
            along = (found * cross).sum(1)
            by = torch.where((along > 0) & unbiased, self.cut.square().sum((1, 2)) / along, 1.0)
            found *= by[:, None]
        return found.to(SCALES)

    def better(self, first: Tensor, second: Tensor, width: int) -> Tensor:
        """Of two codings of each vector the one of less error."""
        lost = []
        for codes in (first, second):
            values = self.values(codes, width)
            lost.append((self.cut - values * self.scales(values).float()[..., None]).square().sum((1, 2)))
        return torch.where((lost[1] < lost[0])[:, None], second, first)


def _cut(vectors: Tensor, length: int) -> Tensor:
    """(n, L) -> (n, groups, numbers), zeros behind the last."""
    filled = pad(vectors, (0, -length % GROUP) if length > GROUP else (0, 0))
    return filled.view(len(vectors), groups_of(length), -1)


def distortions(length: int) -> Tensor:
    """D of normal vectors at every width of WIDTHS, float64: more of short ones, whose first numbers have few windows."""
    begun = {width: 1 + BEGINNING / max(length, 1) if width in TRELLIS_WIDTHS else 1.0 for width in WIDTHS}
    shares = torch.tensor([DISTORTIONS[width] * begun[width] for width in WIDTHS], dtype=torch.float64)
    return shares.clamp_max(1)


def lost_shares(vectors: Tensor, weigh: Weigh = as_it_is) -> Tensor:
    """D of every vector at every width of WIDTHS, (n, widths), for allocation: that of normal numbers, in a metric."""
    found: Tensor = (distortions(vectors.shape[1]) * noise_weights(vectors, weigh)[:, None]).clamp_(0, 1)
    return found


def noise_weights(vectors: Tensor, weigh: Weigh = as_it_is) -> Tensor:
    """How much more noise counts than the vector does, (n,) float64 on the CPU: 1 plainly, 0 for a vector of zeros.

    What coding adds points anywhere: in a metric it counts as much as a random direction does there, and the vector as it does.
    """
    energy = vectors.double().square().sum(1)
    weight = torch.ones_like(energy)
    if weigh is not as_it_is and len(vectors):
        drawn = torch.randn(PROBES, vectors.shape[1], generator=torch.Generator().manual_seed(PROBE_SEED))
        power = float(weigh(drawn.to(vectors)).double().square().sum() / drawn.double().square().sum())
        weight = power * energy / weigh(vectors).double().square().sum(1).clamp_min(SMALLEST_NORM)
    return torch.where(energy > 0, weight, 0.0).cpu()  # nothing can be lost of nothing


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Vectors (r, n) in codes: rest, and what they are made of what is known, `base` (r₀, n): mix (r, r₀)."""

    rest: Encoded
    mix: Encoded | None = None
    base: Tensor | None = None

    def scaled(self, by: float | Tensor) -> "CodedRows":
        """The same codes under scales times `by`, a number or (r, 1)."""
        return replace(self, rest=self.rest.scaled(by), mix=None if self.mix is None else self.mix.scaled(by))

    def decode(self) -> Tensor:
        """(r, n) float32."""
        if self.mix is None or self.base is None:
            return self.rest.decode()
        return torch.addmm(self.rest.decode(), self.mix.decode(), self.base)

    def tensors(self, key: str) -> dict[str, Coded]:
        """Its codes by the key of its tensor."""
        mix = {} if self.mix is None else {f"{key}{MIX}": self.mix.coded}
        return {**mix, key: self.rest.coded}


def code_rows(
    rows: Tensor, widths: Sequence[Side], base: Tensor | None = None, unbiased: bool = True,
    like: tuple[Tensor, Tensor] | None = None,
) -> CodedRows:  # fmt: skip
    """Vectors (r, n) in codes, against `base` (r₀, n) where their mixes have widths.

    unbiased: whether what training changed is stored as large as it is (`encode`). like: scales of mix and rest that may fit.
    """
    mix_widths, rest_widths = zip(*widths, strict=True) if widths else ((), ())
    if base is None or not any(mix_widths):
        return CodedRows(encode(rows, rest_widths))
    mixed = mixed_rows(widths)
    mix = encode(mix_of(rows, base), mix_widths, None if like is None else like[0])
    left = torch.where(mixed[:, None], rows - mix.decode() @ base, rows)
    rest = encode(left, rest_widths, None if like is None else like[1], mixed & unbiased)
    return CodedRows(rest, mix, base)


def mixed_rows(widths: Sequence[Side]) -> Tensor:
    """Which vectors are stored against what is known: (r,)."""
    return torch.tensor([mix != NONE for mix, _ in widths], dtype=torch.bool)


@dataclass(frozen=True, slots=True)
class CodedPair:
    """B (as r vectors of length out) and A (r, in) in codes, and what they lose of their target."""

    b: CodedRows
    a: CodedRows
    lost: float

    def factors(self) -> Factors:
        """The decoded product, float32."""
        return Factors(self.b.decode().T, self.a.decode())


def code_pair(
    target: Factors, start: Factors, widths: Sequence[Widths], bases: tuple[Tensor | None, Tensor | None] = (None, None),
    metric: Metric = PLAIN, unbiased: bool = True,
) -> CodedPair:  # fmt: skip
    """The coded product nearest to `target` in the metric that follows from `start` (out, r), (r, in).

    bases: B₀ᵀ (r₀, out) and A₀ (r₀, in), where they are known.
    """
    weighed = metric.weighed(target)
    columns, rows_widths = [b for b, _ in widths], [a for _, a in widths]
    b = code_rows(start.b.T, columns, bases[0], unbiased)
    kept = metric.left(b.decode().to(start.b)).double()  # B̂ᵀ
    gram = kept @ kept.T
    rows = _solved(gram, (kept @ weighed.b.double()) @ target.a.double())
    a = code_rows(rows, rows_widths, bases[1], unbiased)
    other = metric.right(a.decode().to(start.a)).double()
    along = ((kept @ weighed.b.double()) * (other @ weighed.a.double().T)).sum(1)
    lengths = _solved(gram * (other @ other.T), along).cpu()[:, None]
    a = a.scaled(torch.where(mixed_rows(rows_widths)[:, None], 1.0, lengths) if unbiased else lengths)
    found = metric.weighed(Factors(b.decode().T, a.decode()).to(device=start.b.device))
    return CodedPair(b, a, residual_energy(weighed, Grams.of(weighed), found))


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """gram⁻¹ right, by pseudo-inverse where coded vectors coincide."""
    solved: Tensor = torch.linalg.pinv(gram, hermitian=True) @ right
    return solved.float()
