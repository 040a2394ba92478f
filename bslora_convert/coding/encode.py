"""Vectors into codes: the scale of each group searched, the product of two coded sides refitted.

For a group x (g numbers) and a scale s the codes are c_i = argmin |x_i − s·level(c_i)|, and for codes c the best scale is

    s = ⟨x, level(c)⟩ / ‖level(c)‖²        so that   ‖x − x̂‖² = ‖x‖² − ‖x̂‖²

The search starts from several scales (CLIPS, parts of the group's root mean square, and its largest number), turns the two around
once, rounds s as it is stored, and keeps the codes of least error under the rounded scale.

A component σ u vᵀ stands balanced, √σ on each side. With each side's lost share D (of ‖x‖²) its product loses

    ‖σ u vᵀ − û v̂ᵀ‖² = σ² (1 − (1 − D_u)(1 − D_v))                     by the identity above

Fit of a module's local part T ≈ B A (out, r)(r, in) at given widths: B̂ = coded(B), then in turns, keeping what lowers the error,

    A = (B̂ᵀB̂)⁻¹ B̂ᵀT,  Â = coded(A)        B = T Âᵀ(ÂÂᵀ)⁻¹,  B̂ = coded(B)

so that each row of A is fitted to what all coded columns of B left, and the errors of coding don't add up blindly. In a metric
(`metric`) lengths are those of weighed vectors, and the turns are A = (B̂ᵀΓB̂)⁻¹ B̂ᵀΓT and B = T Σ Âᵀ (ÂΣÂᵀ)⁻¹.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from bslora_convert.bslora.coding.coded import GROUP, SCALES, Coded, groups_of
from bslora_convert.bslora.coding.levels import EDGES, LEVELS
from bslora_convert.bslora.coding.widths import WIDTHS
from bslora_convert.metric.metric import PLAIN, Metric, Weigh, as_it_is
from bslora_convert.modules.factors import Factors
from bslora_convert.modules.lowrank import Grams, residual_energy

CLIPS = (0.8, 0.9, 1.0, 1.1, 1.25)
TURNS = 2
SMALLEST_SCALE = 1e-30
SMALLEST_NORM = 1e-300


def encode(vectors: Tensor, widths: Sequence[int]) -> Coded:
    """(n, L) vectors, one width each.

    :raises ValueError: for a width that is not one of WIDTHS.
    """
    n, length = vectors.shape
    vectors = vectors.float().cpu()
    named = torch.tensor(widths, dtype=torch.uint8)
    codes = torch.zeros(n, length, dtype=torch.uint8)
    scales = torch.zeros(n, groups_of(length), dtype=SCALES)
    exact = None
    for width in sorted(set(widths)):
        if width not in WIDTHS:
            raise ValueError(f"width {width}: one of {WIDTHS} is allowed")
        chosen = named == width
        if width == 16:
            exact = torch.zeros(n, length, dtype=SCALES)
            exact[chosen] = vectors[chosen].to(SCALES)
        else:
            codes[chosen], scales[chosen] = _searched(vectors[chosen], width)
    return Coded(named, codes, scales, exact)


def _searched(vectors: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Codes (n, L) and scales (n, groups) of least error among the scales tried."""
    n, length = vectors.shape
    groups = pad(vectors, (0, -length % GROUP) if length > GROUP else (0, 0)).view(n, groups_of(length), -1)
    counted = torch.full((groups.shape[1],), float(groups.shape[2]))
    counted[-1] = length - (groups.shape[1] - 1) * groups.shape[2]
    rms = (groups.square().sum(2) / counted).sqrt()
    levels = LEVELS[width]
    starts = [clip * rms for clip in CLIPS] if width < 8 else []
    tried = torch.stack([*starts, groups.abs().amax(2) / levels[-1]])  # (starts, n, groups)
    real = torch.arange(groups.shape[2]) < counted[:, None]
    values = levels[_nearest(groups, tried, width).int()] * real
    stored = ((groups * values).sum(3) / values.square().sum(3)).to(SCALES)
    nearest = _nearest(groups, stored.float(), width)
    values = levels[nearest.int()] * stored.float()[..., None]
    best = ((groups - values) * real).square().sum(3).argmin(0)[None]
    codes = nearest.gather(0, best[..., None].expand(1, *groups.shape))[0]
    return codes.view(n, -1)[:, :length], stored.gather(0, best)[0]


def _nearest(groups: Tensor, scales: Tensor, width: int) -> Tensor:
    return torch.bucketize(groups / scales.clamp_min(SMALLEST_SCALE)[..., None], EDGES[width], out_int32=True).to(
        torch.uint8
    )


def lost_shares(vectors: Tensor, weigh: Weigh = as_it_is) -> Tensor:
    """D of every vector at every width of WIDTHS, (n, widths), at the scale of its root mean square: for allocation.

    weigh: the metric that D is measured in.
    """
    n = vectors.shape[0]
    vectors = vectors.contiguous()
    weighed = weigh(vectors)
    energy = weighed.double().square().sum(1)
    found = torch.zeros(n, len(WIDTHS), dtype=torch.float64)
    for column, width in enumerate(WIDTHS):
        if width == 16:
            kept = vectors.to(torch.bfloat16).float()
        else:
            rms = vectors.square().mean(1, keepdim=True).sqrt()
            if width == 8:
                rms = vectors.abs().amax(1, keepdim=True) / LEVELS[8][-1]
            kept = LEVELS[width][_nearest(vectors, rms[:, 0], width).int()] * rms
        kept = weigh(kept)
        norms = kept.double().square().sum(1) * energy
        found[:, column] = 1 - (weighed * kept).double().sum(1) ** 2 / norms.clamp_min(SMALLEST_NORM)
    found[energy == 0] = 0.0  # nothing can be lost of nothing
    return found.clamp_(0, 1)


@dataclass(frozen=True, slots=True)
class CodedPair:
    """B (as r vectors of length out) and A (r, in) in codes, and what they lose of their target."""

    b: Coded
    a: Coded
    lost: float

    def factors(self) -> Factors:
        """The decoded product, float32."""
        return Factors(self.b.decode().T, self.a.decode())


def code_pair(
    target: Factors, start: Factors, b_widths: Sequence[int], a_widths: Sequence[int], metric: Metric = PLAIN
) -> CodedPair:
    """The coded product nearest to `target` in the metric that turns from `start` (out, r), (r, in) find."""
    weighed = metric.weighed(target)
    grams = Grams.of(weighed)

    def measured(b: Coded, a: Coded) -> CodedPair:
        found = metric.weighed(Factors(b.decode().T, a.decode()))
        return CodedPair(b, a, residual_energy(weighed, grams, found))

    b = encode(start.b.T, b_widths)
    best = measured(b, encode(start.a, a_widths))
    if not len(b_widths):
        return best
    for _ in range(TURNS):
        before = best.lost
        kept = metric.left(best.b.decode()).double()  # B̂ᵀ
        rows = _solved(kept @ kept.T, (kept @ weighed.b.double()) @ target.a.double())
        best = min(best, measured(best.b, encode(rows, a_widths)), key=lambda pair: pair.lost)
        kept = metric.right(best.a.decode()).double()
        columns = _solved(kept @ kept.T, (kept @ weighed.a.double().T) @ target.b.double().T)
        best = min(best, measured(encode(columns, b_widths), best.a), key=lambda pair: pair.lost)
        if best.lost == before:
            break
    return best


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """gram⁻¹ right, by pseudo-inverse where coded vectors coincide."""
    solved: Tensor = torch.linalg.pinv(gram, hermitian=True) @ right
    return solved.float()
