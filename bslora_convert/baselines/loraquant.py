"""LoRAQuant (arXiv 2510.26690): the strong components of each update in two or three bits, the rest as signs.

    B A = U Σ Vᵀ,  b_i = √σ_i u_i,  a_i = √σ_i v_iᵀ
    h_m = the least h with Σ_{i ≤ h} σ_i² ≥ ρ Σ σ_i²         i ≤ h: affine grid of 2 or 3 bits; i > h: sign and mean |x|

Every module's h follows from the one ratio ρ; blocks are of 128 numbers of one b_i or a_i. The largest ρ whose codes fit is
taken, with 2 and with 3 bits, and the better of the two kept. It cuts no component away: 1.125 bits a number are its least.

`loraquant` moves each strong pair before it is rounded, by gradient steps on

    ‖b_i a_i − Q(b) Q(a)‖_F,  squared: ‖b_i‖² ‖a_i‖² − 2 (b_iᵀ Q(b)) (Q(a) a_iᵀ) + ‖Q(b)‖² ‖Q(a)‖²

and keeps the best pair of all steps; `loraquant_plain` rounds the pairs as they are. As in the authors' code (300 steps of 0.01;
github.com/Anonymous890920/LoRAQuant) the slope reaches b and a through the scales, by the two ends of each block: the range
shrinks until what it clips costs as much as finer steps gain. A slope that passes straight through the rounding too was tried
and gained less.

`…_initial`: with A's random initialisation known, a_i = t_i A₀ + δ_i, and δ_i has the codes that a_i has otherwise, of all
components, of the strong ones or of none (`initialised`); the slope for δ_i is that for a_i, with Q(a) = t_i A₀ + Q(δ).
"""

from collections.abc import Mapping
from functools import cache, partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bslora_convert.baselines.baseline import Fitted, Fitter, largest
from bslora_convert.baselines.blocks import TINY, Blocks, Grid, affine, in_blocks, sign
from bslora_convert.baselines.coded import CodedFactors, larger
from bslora_convert.baselines.initialised import INITIAL, NOTHING, PLAIN, Known, Rows, best_of, lost
from bslora_convert.baselines.quantised import quantised_in
from bslora_convert.fit.source import Source

BLOCK = 128
STRONG: Mapping[int, Grid] = {bits: affine(bits, BLOCK) for bits in (2, 3)}
WEAK = sign(BLOCK)

STEPS, RATE = 50, 0.01  # 300 lose at most 0.1 points less of what loses 6 to 28

Pair = tuple[Blocks, Blocks]
Split = tuple[Mapping[str, int], Rows]  # strong components of every module, how rows of A are stored
REST = ("none", "strong", "all")  # components whose δ has codes


class Way(NamedTuple):
    """How the bytes are spent: bits of strong components; of REST, or None for A without its initialisation."""

    bits: int
    rest: str | None = None


class CodePair(Protocol):
    """A way to code strong components."""

    def __call__(self, b: Tensor, a: Tensor, grid: Grid, held: Tensor | None = None, rest: bool = True) -> Pair:
        """Codes of the vectors b (k, out) and a (k, in).

        held: T̂ A₀ (k, in), to which the codes of a are added, where A's initialisation is known. rest: whether a has codes.
        """


def loraquant(
    code_strong: CodePair, initial: bool, source: Source, budget: int, storage: torch.dtype, seed: int
) -> Fitted:
    """The largest ρ that fits, with the width of strong components, and the components whose δ has codes, that lose least.

    :raises OutOfReach: when one strong component of each module and signs for the rest are more than the budget, or A's random
    initialisation has to be known and is not.
    """
    shares = {name: energies.cumsum(0) / energies.sum() for name, energies in source.spectra.items() if energies.sum()}
    ratios = [0.0, *torch.cat(list(shares.values())).unique().tolist()] if shares else [0.0]
    known = Known.of(source) if initial else NOTHING

    def split(way: Way, ratio: float) -> Split:
        strong = _strong(source, shares, ratio)
        if way.rest is None:
            return strong, PLAIN
        whole = {name: len(energies) for name, energies in source.spectra.items()}
        return strong, Rows(known, {"none": {}, "strong": strong, "all": whole}[way.rest])

    @cache
    def ratio_of(way: Way) -> float:
        def size(place: int) -> int:
            return _bytes(source, way.bits, split(way, ratios[place - 1]))

        return ratios[largest(size, budget * storage.itemsize, len(ratios), "LoRAQuant", "bytes") - 1]

    def fit(way: Way, code_strong: CodePair) -> Fitted:
        ratio = ratio_of(way)
        settings = {"bits": f"{way.bits} and 1", "ρ": round(ratio, 4)}
        return _fitted(source, split(way, ratio), way.bits, code_strong, settings)

    def left(way: Way, fitted: Fitted) -> float:
        return lost(source, fitted, split(way, ratio_of(way))[1], known)

    ways = [Way(bits, rest) for rest in ((*REST, None) if initial else (None,)) for bits in STRONG]
    best = best_of(ways, lambda way: fit(way, rounded), left)
    return fit(best, code_strong)


def _strong(source: Source, shares: Mapping[str, Tensor], ratio: float) -> dict[str, int]:
    """Strong components of every module, one at least."""
    return {
        name: min(int((shares[name] < ratio).sum()) + 1 if name in shares else 1, len(energies))
        for name, energies in source.spectra.items()
    }


def _bytes(source: Source, bits: int, split: Split) -> int:
    strong, rows = split
    total = 0
    for name, (out, width) in source.shapes.items():
        count, k = len(source.spectra[name]), strong[name]
        coded, first = rows.coded(name, count), rows.coded(name, k)
        total += STRONG[bits].bytes(k, out) + STRONG[bits].bytes(first, width)
        total += WEAK.bytes(count - k, out) + WEAK.bytes(coded - first, width)
        total += count * rows.beside(name)
    return total


def _fitted(source: Source, split: Split, bits: int, code_strong: CodePair, settings: Mapping[str, object]) -> Fitted:
    strong, rows = split

    def code(name: str) -> CodedFactors:
        factors = source.svds[name].truncate([source.deltas[name].factors()], len(source.spectra[name]))
        b, a = factors.b.float().T, factors.a.float()
        mix, k, coded = rows.mix(name, a), strong[name], rows.coded(name, len(a))
        held = None if mix is None else mix.decode()
        rest = a if held is None else a - held
        first = code_strong(b[:k], a[:k], STRONG[bits], None if held is None else held[:k], coded > 0)
        second = WEAK.encode(b[k:]), WEAK.encode(rest[k:coded])
        by = larger(rest[: len(first[1].codes)], first[1]), larger(rest[k:coded], second[1])
        return CodedFactors((first, second), mix=mix, larger=by)

    return quantised_in(source, code, settings, rows)


def rounded(b: Tensor, a: Tensor, grid: Grid, held: Tensor | None = None, rest: bool = True) -> Pair:
    """Codes of the vectors as they are."""
    left = a if held is None else a - held
    return grid.encode(b), grid.encode(left if rest else left[:0])


def optimised(b: Tensor, a: Tensor, grid: Grid, held: Tensor | None = None, rest: bool = True) -> Pair:
    """Codes of vectors whose products, component by component, are nearest to b a."""
    start, beside = (b, a), (torch.zeros_like(b), torch.zeros_like(a) if held is None else held)
    sides = (0, 1) if rest else (0,)  # that have codes
    moved = [one - other for one, other in zip(start, beside, strict=True)]
    energy, least = _squares(b) * _squares(a), torch.full((len(b),), torch.inf, device=b.device)
    best = list(moved)
    for _ in range(STEPS + 1):
        codes = {side: grid.encode(moved[side]) for side in sides}
        found = [beside[side] + codes[side].decode() if side in codes else beside[side] for side in (0, 1)]
        along = [(side * kept).sum(1) for side, kept in zip(start, found, strict=True)]
        energies = [_squares(kept) for kept in found]
        error = (energy - 2 * along[0] * along[1] + energies[0] * energies[1]).clamp_min(TINY).sqrt()
        better = error < least
        least = torch.where(better, error, least)
        best = [torch.where(better[:, None], new, old) for new, old in zip(moved, best, strict=True)]
        for side in sides:
            other = 1 - side
            slope = energies[other][:, None] * found[side] - along[other][:, None] * start[side]
            moved[side] = _moved(moved[side], codes[side], slope / error[:, None])
    return grid.encode(best[0]), grid.encode(best[1] if rest else best[1][:0])


def _moved(x: Tensor, codes: Blocks, slope: Tensor) -> Tensor:
    """One step: of each block the largest number and the least, which its scale is made of. slope (k, L): of what is decoded."""
    blocks = in_blocks(x, codes.block)
    of_scale = in_blocks(slope * codes.steps, codes.block).sum(-1, keepdim=True) / (len(codes.levels) - 1)
    for end, sense in ((blocks.argmax(-1, keepdim=True), -1), (blocks.argmin(-1, keepdim=True), 1)):
        blocks = blocks.scatter_add(-1, end, sense * RATE * of_scale)
    return blocks.flatten(1)[:, : x.shape[1]]


def _squares(vectors: Tensor) -> Tensor:
    return vectors.square().sum(1)


LORAQUANT: Mapping[str, Fitter] = {
    "loraquant": partial(loraquant, optimised, False),
    "loraquant_plain": partial(loraquant, rounded, False),
}

LORAQUANT_INITIAL: Mapping[str, Fitter] = {
    f"loraquant{INITIAL}": partial(loraquant, optimised, True),
    f"loraquant_plain{INITIAL}": partial(loraquant, rounded, True),
}
