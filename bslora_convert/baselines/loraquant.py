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
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from bslora_convert.baselines.baseline import Fitted, Fitter, OutOfReach, largest
from bslora_convert.baselines.blocks import TINY, Blocks, CodedFactors, Grid, affine, in_blocks, sign
from bslora_convert.baselines.quantised import quantised_in
from bslora_convert.fit.parallel import each
from bslora_convert.fit.source import Source
from bslora_convert.modules.lowrank import residual_energy

BLOCK = 128
STRONG: Mapping[int, Grid] = {bits: affine(bits, BLOCK) for bits in (2, 3)}
WEAK = sign(BLOCK)

STEPS, RATE = 50, 0.01  # 300 lose at most 0.1 points less of what loses 6 to 28

Pair = tuple[Blocks, Blocks]
CodePair = Callable[[Tensor, Tensor, Grid], Pair]


def loraquant(code_strong: CodePair, source: Source, budget: int, storage: torch.dtype, seed: int) -> Fitted:
    """The largest ρ that fits, with the width of strong components that loses least.

    :raises OutOfReach: when one strong component of each module and signs for the rest are more than the budget.
    """
    shares = {name: energies.cumsum(0) / energies.sum() for name, energies in source.spectra.items() if energies.sum()}
    ratios = [0.0, *torch.cat(list(shares.values())).unique().tolist()] if shares else [0.0]
    tried: list[tuple[float, int, float]] = []
    refused: OutOfReach | None = None
    for bits in STRONG:

        def size(place: int, bits: int = bits) -> int:
            return _bytes(source, _split(source, shares, ratios[place - 1]), bits)

        try:
            ratio = ratios[largest(size, budget * storage.itemsize, len(ratios), "LoRAQuant", "bytes") - 1]
        except OutOfReach as reason:
            refused = refused or reason
            continue
        tried.append((_lost(source, _fitted(source, shares, ratio, bits, rounded)), bits, ratio))
    if not tried:
        assert refused is not None  # each width fitted or was refused
        raise refused
    _, bits, ratio = min(tried)
    return _fitted(source, shares, ratio, bits, code_strong)


def _split(source: Source, shares: Mapping[str, Tensor], ratio: float) -> dict[str, int]:
    """Strong components of every module, one at least."""
    return {
        name: min(int((shares[name] < ratio).sum()) + 1 if name in shares else 1, len(energies))
        for name, energies in source.spectra.items()
    }


def _bytes(source: Source, strong: Mapping[str, int], bits: int) -> int:
    return sum(
        STRONG[bits].bytes(strong[name], side) + WEAK.bytes(len(source.spectra[name]) - strong[name], side)
        for name, shape in source.shapes.items()
        for side in shape
    )


def _fitted(source: Source, shares: Mapping[str, Tensor], ratio: float, bits: int, code_strong: CodePair) -> Fitted:
    strong = _split(source, shares, ratio)

    def code(name: str) -> CodedFactors:
        factors = source.svds[name].truncate([source.deltas[name].factors()], len(source.spectra[name]))
        b, a = factors.b.float().T, factors.a.float()
        k = strong[name]
        strong_codes = code_strong(b[:k], a[:k], STRONG[bits])
        return CodedFactors((strong_codes, (WEAK.encode(b[k:]), WEAK.encode(a[k:]))))

    return quantised_in(source, code, {"bits": f"{bits} and 1", "ρ": round(ratio, 4)})


def _lost(source: Source, fitted: Fitted) -> float:
    def lost(name: str) -> float:
        return residual_energy(source.deltas[name].factors(), source.grams[name], fitted.deltas[name])

    return sum(each(lost, source.deltas))


def rounded(b: Tensor, a: Tensor, grid: Grid) -> Pair:
    """Codes of the vectors b (k, out) and a (k, in) as they are."""
    return grid.encode(b), grid.encode(a)


def optimised(b: Tensor, a: Tensor, grid: Grid) -> Pair:
    """Codes of the vectors b (k, out) and a (k, in) whose products, component by component, are nearest to b a."""
    start, moved = (b, a), (b.clone(), a.clone())
    energy, least = _squares(b) * _squares(a), torch.full((len(b),), torch.inf, device=b.device)
    best = start
    for _ in range(STEPS + 1):
        codes = [grid.encode(side) for side in moved]
        found = [one.decode() for one in codes]
        along = [(side * kept).sum(1) for side, kept in zip(start, found, strict=True)]
        energies = [_squares(kept) for kept in found]
        error = (energy - 2 * along[0] * along[1] + energies[0] * energies[1]).clamp_min(TINY).sqrt()
        better = error < least
        least = torch.where(better, error, least)
        best = (torch.where(better[:, None], moved[0], best[0]), torch.where(better[:, None], moved[1], best[1]))
        slopes = [
            (energies[1 - side][:, None] * found[side] - along[1 - side][:, None] * start[side]) / error[:, None]
            for side in (0, 1)
        ]
        moved = (_moved(moved[0], codes[0], slopes[0]), _moved(moved[1], codes[1], slopes[1]))
    return grid.encode(best[0]), grid.encode(best[1])


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
    "loraquant": partial(loraquant, optimised),
    "loraquant_plain": partial(loraquant, rounded),
}
