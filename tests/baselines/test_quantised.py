"""Rounded LoRAs: what a file's bytes say, decoded again in float64; their sizes; tables that others publish."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bslora_convert.baselines import QUANTISED, WHOLE, OutOfReach
from bslora_convert.baselines.blocks import Blocks, Grid, affine, sign
from bslora_convert.baselines.loraquant import STRONG, WEAK, optimised, rounded
from bslora_convert.baselines.nf4 import DYNAMIC, NF4, QUANTILES
from bslora_convert.baselines.quantised import GRIDS, TRUNCATED
from bslora_convert.baselines.ranks import bytes_of
from bslora_convert.bslora.codes.packing import unpack
from bslora_convert.comparison.forms import as_strong
from bslora_convert.fit.source import Source, measure
from bslora_convert.lora import LoraModule
from bslora_convert.modules.factors import Factors
from tests.baselines.planted import dense, drawn, random_source, relative_error, source_of

MIDDLE = {"rtn_int8": 127, "rtn_int4": 7}
ALL_GRIDS = {**GRIDS, "affine_2": affine(2, 128), "affine_3": affine(3, 128), "sign": sign(128)}


def vectors(n: int = 5, length: int = 200, seed: int = 0) -> Tensor:
    return drawn(seed)(n, length) * torch.logspace(-4, 3, n)[:, None]


def read(stored: list[Tensor], grid: Grid, shape: tuple[int, int], kind: str) -> Tensor:
    """What a reader makes of the file's tensors, number by number, in float64."""
    n, length = shape
    per_vector = -(-length // grid.block)
    codes = unpack(stored[0], grid.bits)[: n * length].tolist()
    rest = stored[1:]
    zeros = unpack(rest.pop(0), grid.bits).tolist() if kind.startswith("affine") else None
    if kind == "nf4":
        nested, largest, offset = rest
        scales = [
            DYNAMIC[code].double() * largest[at // 256].double() + offset.double()
            for at, code in enumerate(nested.flatten().tolist())
        ]
    else:
        scales = list(rest[0].double().flatten())
    out = torch.zeros(n, length, dtype=torch.float64)
    for i in range(n):
        for j in range(length):
            code, block = codes[i * length + j], i * per_vector + j // grid.block
            level = float(QUANTILES[code]) if kind == "nf4" else code - (zeros[block] if zeros else MIDDLE.get(kind, 0))
            if kind == "sign":
                level = 2 * code - 1
            out[i, j] = level * scales[block]
    return out


@pytest.mark.parametrize("kind", ALL_GRIDS)
@pytest.mark.parametrize("shape", [(5, 200), (1, 64), (3, 129), (20, 1000)])
def test_bytes_of_a_file_decode_to_what_is_measured(kind: str, shape: tuple[int, int]) -> None:
    grid, x = ALL_GRIDS[kind], vectors(*shape)
    codes = grid.encode(x)
    cancelled = (
        1e-6 * float(x.abs().max()) if kind == "nf4" else 0.0
    )  # offset and absmax of the second level, in float32
    assert torch.allclose(codes.decode().double(), read(codes.stored(), grid, shape, kind), rtol=1e-6, atol=cancelled)
    assert codes.bytes == grid.bytes(*shape)


@pytest.mark.parametrize("kind", ALL_GRIDS)
def test_every_number_is_given_its_nearest_level(kind: str) -> None:
    x = drawn(2)(4, 256)
    codes = ALL_GRIDS[kind].encode(x)
    one = torch.ones_like(codes.codes)
    for moved in (codes.codes - one, codes.codes + one):
        inside = (moved < 2**codes.bits) & (moved != 255 if codes.bits < 8 else moved <= 254)
        other = Blocks(
            moved.clamp_max(2**codes.bits - 1), codes.scales, codes.levels, codes.bits, codes.block, codes.zeros
        )
        # NF4 chooses under the absmax itself and reads under the quantised one.
        slack = 0.02 * x.abs().amax(1, keepdim=True) if kind == "nf4" else 1e-6 * x.abs()
        assert bool(((x - codes.decode()).abs() <= (x - other.decode()).abs() + slack)[inside].all())


@pytest.mark.parametrize("kind", ALL_GRIDS)
@pytest.mark.parametrize(
    "x", [torch.zeros(2, 70), torch.zeros(0, 70), torch.full((1, 70), 3.0), -torch.ones(1, 3) * 1e-30]
)
def test_odd_vectors(kind: str, x: Tensor) -> None:
    grid = ALL_GRIDS[kind]
    codes = grid.encode(x)
    assert codes.bytes == grid.bytes(*x.shape)
    assert torch.allclose(codes.decode(), x, rtol=0.01)


@pytest.mark.parametrize(
    ("kind", "lost"), [("rtn_int8", 5e-5), ("rtn_int4", 0.015), ("nf4", 0.011), ("affine_3", 0.05), ("sign", 0.37)]
)
def test_normal_numbers_lose_what_the_grid_does(kind: str, lost: float) -> None:
    x = drawn(3)(40, 1024)
    share = float((x - ALL_GRIDS[kind].encode(x).decode()).square().sum() / x.square().sum())
    assert lost / 2 < share < lost


def test_the_published_ends_of_the_tables() -> None:
    # QLoRA, arXiv 2305.14314, appendix E; bitsandbytes.functional.create_dynamic_map().
    assert len(QUANTILES) == 16
    assert QUANTILES[[0, 1, 7, 8, 15]].tolist() == pytest.approx([-1.0, -0.69619280, 0.0, 0.07958030, 1.0])
    assert len(DYNAMIC) == 256
    assert DYNAMIC[[0, 127, 128, 254, 255]].tolist() == pytest.approx([-0.99296875, 0.0, 5.5e-7, 0.99296875, 1.0])


def test_nf4_is_what_bitsandbytes_writes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), QUANTILES)
    assert torch.allclose(functional.create_dynamic_map(), DYNAMIC, rtol=1e-6, atol=0)
    x = vectors(16, 576)
    packed, state = functional.quantize_4bit(x, blocksize=64, compress_statistics=True, quant_type="nf4")
    theirs = functional.dequantize_4bit(packed, state)
    ours = NF4.encode(x)
    assert torch.allclose(ours.decode(), theirs, rtol=1e-4, atol=1e-6 * float(x.abs().max()))
    tables = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes + state.offset.nbytes
    assert ours.bytes == tables


def lora(scaling: float) -> Source:
    random = drawn(1)
    return measure({"layers.0.q_proj": LoraModule(random(64, 4), random(4, 128), scaling)})


@pytest.mark.parametrize("form", WHOLE)
def test_the_whole_adapter_is_its_own_factors_rounded(form: str) -> None:
    source, grid = lora(2.0), GRIDS[form]
    stored = source.deltas["layers.0.q_proj"].stored
    fitted = WHOLE[form](source, 0, torch.bfloat16, 0)
    b, a = grid.encode(stored.b.T), grid.encode(stored.a)
    assert fitted.bytes == b.bytes + a.bytes
    assert torch.allclose(dense(fitted.deltas["layers.0.q_proj"]), 2.0 * b.decode().double().T @ a.decode().double())


@pytest.mark.parametrize("form", TRUNCATED)
def test_truncated_codes_are_the_best_part_rounded(form: str) -> None:
    source, name = random_source(), form.removeprefix("svd_").removesuffix("_adaptive")
    grid, budget = GRIDS[name], 600
    fitted = TRUNCATED[form](source, budget, torch.bfloat16, 0)
    ranks = {name: factors.rank for name, factors in fitted.deltas.items()}
    assert fitted.bytes == bytes_of(grid, source, ranks) <= 2 * budget
    for module, factors in fitted.deltas.items():
        u, s, v = torch.linalg.svd(dense(source.deltas[module].factors()), full_matrices=False)
        best = u[:, : factors.rank] * s[: factors.rank] @ v[: factors.rank]
        close = 0.02 if name == "rtn_int8" else 0.35
        assert float((dense(factors) - best).norm()) <= close * float(best.norm())
    if not form.endswith("_adaptive"):
        assert len(set(ranks.values())) == 1
        more = {module: rank + 1 for module, rank in ranks.items()}
        assert bytes_of(grid, source, more) > 2 * budget


@pytest.mark.parametrize("form", QUANTISED)
def test_sizes_are_kept_to_and_errors_fall(form: str) -> None:
    source, errors = random_source(rank=8), []
    for budget in (1400, 5000) if form == "loraquant" else (1400, 2000, 3200, 5000):
        fitted = QUANTISED[form](source, budget, torch.bfloat16, 0)
        assert fitted.bytes is not None
        assert 0 < fitted.bytes <= 2 * budget
        errors.append(relative_error(source, fitted))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6


@pytest.mark.parametrize("form", QUANTISED)
def test_a_size_out_of_reach(form: str) -> None:
    with pytest.raises(OutOfReach, match="bytes at least, the budget is 20"):
        QUANTISED[form](random_source(), 10, torch.bfloat16, 0)


@pytest.mark.parametrize("form", [*QUANTISED, *WHOLE])
def test_the_same_again(form: str) -> None:
    (one,), (two,) = (
        {**QUANTISED, **WHOLE}[form](lora(1.0), 160, torch.bfloat16, seed).deltas.values() for seed in (0, 1)
    )
    assert torch.equal(one.b, two.b)
    assert torch.equal(one.a, two.a)


@pytest.mark.parametrize("form", [*QUANTISED, *WHOLE])
def test_the_strength_goes_into_scales_that_are_stored_anyway(form: str) -> None:
    source = random_source(rank=8)
    fitted = {**QUANTISED, **WHOLE}[form](source, 1500, torch.bfloat16, 0)
    strong = as_strong(source, fitted, torch.bfloat16)
    assert strong.bytes == fitted.bytes
    gains = []
    for name, delta in source.deltas.items():
        target = dense(delta.factors())
        plain, scaled = dense(fitted.deltas[name]), dense(strong.deltas[name])
        needed = float(target.square().sum() / (target * plain).sum())
        gains.append(float((target * scaled).sum() / target.square().sum()))
        assert gains[-1] == pytest.approx(min(needed, 4.0) / needed, abs=0.005)  # bfloat16 scales
    assert any(gain == pytest.approx(1, abs=0.005) for gain in gains)


def test_loraquant_splits_by_the_ratio() -> None:
    source = random_source(rank=8)
    fitted = QUANTISED["loraquant_plain"](source, 1900, torch.bfloat16, 0)
    ratio = fitted.settings["ρ"]
    bits = int(fitted.settings["bits"][0])
    size = 0
    for name, energies in source.spectra.items():
        shares = energies.cumsum(0) / energies.sum()
        strong = int((shares < ratio - 1e-4).sum()) + 1
        update = source.svds[name].truncate([source.deltas[name].factors()], 8)
        parts = [(STRONG[bits], slice(strong)), (WEAK, slice(strong, None))]
        halves = [(grid.encode(update.b.T[kept]), grid.encode(update.a[kept])) for grid, kept in parts]
        size += sum(side.bytes for half in halves for side in half)
        expected = sum(b.decode().double().T @ a.decode().double() for b, a in halves)
        assert torch.allclose(dense(fitted.deltas[name]), expected, atol=1e-5)
    assert size == fitted.bytes


def test_the_optimisation_gains_on_every_pair() -> None:
    random = drawn(5)
    b, a = random(6, 300), random(6, 500)

    def lost(code: Callable[[Tensor, Tensor, Grid], tuple[Blocks, Blocks]], bits: int) -> Tensor:
        left, right = (codes.decode().double() for codes in code(b, a, STRONG[bits]))
        products = torch.einsum("ki,kj->kij", b.double(), a.double()) - torch.einsum("ki,kj->kij", left, right)
        return products.square().sum((1, 2)) / (b.double().square().sum(1) * a.double().square().sum(1))

    for bits, gained in ((2, 0.6), (3, 0.85)):
        assert bool((lost(optimised, bits) < gained * lost(rounded, bits)).all())


def test_an_update_of_nothing() -> None:
    source = source_of({"layers.0.q_proj": Factors(torch.zeros(32, 2), drawn(0)(2, 32))})
    for form, fit in {**QUANTISED, **WHOLE}.items():
        fitted = fit(source, 1000, torch.bfloat16, 0)
        assert not dense(fitted.deltas["layers.0.q_proj"]).any(), form
        assert math.isfinite(float(as_strong(source, fitted, torch.bfloat16).deltas["layers.0.q_proj"].a.sum()))
