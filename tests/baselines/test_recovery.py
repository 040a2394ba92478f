"""Adapters planted in a form are found again in that form, at their own size, from LoRA factors in any gauge."""

from itertools import pairwise

import pytest
import torch

from bslora_convert.baselines import BASELINES
from bslora_convert.baselines.prolora import fit_chunks
from bslora_convert.baselines.tied_lora import fit_tl6
from bslora_convert.baselines.vera import FrozenSide, fit_scales, projections
from bslora_convert.modules.factors import Factors
from bslora_convert.modules.lowrank import residual_energy
from tests.baselines.planted import (
    TIED,
    VERA_RANK,
    bank_planted,
    chunks_planted,
    random_source,
    relative_error,
    source_of,
    tied,
    vera_planted,
)


@pytest.mark.parametrize("seed", [0, 2])
@pytest.mark.parametrize("form", TIED)
def test_tied_factors(form: str, seed: int) -> None:
    modules, parameters = tied(form, seed)
    source = source_of(modules)
    fitted = BASELINES[form](source, parameters, torch.float32, 0)
    assert fitted.parameters <= parameters
    assert relative_error(source, fitted) < 1e-3


@pytest.mark.parametrize("form", ["svd_uniform", "svd_adaptive"])
def test_truncation_at_full_size(form: str) -> None:
    source = random_source()
    assert relative_error(source, BASELINES[form](source, source.parameters, torch.float32, 0)) < 1e-5


def test_vera_between_the_matrices_of_its_seed() -> None:
    modules, parameters = vera_planted(seed=7)
    source = source_of(modules)
    fitted = BASELINES["vera"](source, parameters, torch.float32, 7)
    assert fitted.settings["rank"] == VERA_RANK
    assert relative_error(source, fitted) < 1e-3
    assert relative_error(source, BASELINES["vera"](source, fitted.parameters, torch.float32, 8)) > 0.5


@pytest.mark.parametrize(("seed", "size"), [(0, 6), (1, 12)])
def test_a_bank_from_factors_that_mix_it(seed: int, size: int) -> None:
    modules, parameters = bank_planted(seed, size)
    source = source_of(modules)
    fitted = BASELINES["vb_lora"](source, parameters, torch.float32, 0)
    assert fitted.settings | {"trained_numbers": 0} == {"rank": 4, "vectors": size, "length": 32, "trained_numbers": 0}
    assert relative_error(source, fitted) < 1e-3


@pytest.mark.parametrize(("unshared", "shared"), [(1, 2), (0, 4), (2, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_rotated_chunks(unshared: int, shared: int, seed: int) -> None:
    modules, parameters = chunks_planted(seed, unshared, shared)
    source = source_of(modules)
    for name, delta in source.deltas.items():
        start = source.svds[name].truncate([delta.factors()], unshared + shared)
        chunks, _ = fit_chunks(delta.factors(), start, unshared, shared, 0)
        stored = chunks.b.numel() + chunks.a.numel()
        parameters -= stored
        lost = residual_energy(delta.factors(), source.grams[name], chunks.delta())
        assert (lost / source.grams[name].energy) ** 0.5 < 1e-4
    assert parameters == 0


def never_rises(history: list[float], energy: float) -> bool:
    return all(after <= before + 1e-12 * energy for before, after in pairwise(history))


def test_alternation_never_rises() -> None:
    source = random_source()
    tied_names = [name for name in source.deltas if name.endswith("q_proj")]
    terms = [source.deltas[name].factors() for name in tied_names]
    energy = sum(float((term.b @ term.a).square().sum()) for term in terms)
    for rank in (1, 4, 20, 24):
        _, history = fit_tl6(terms, rank)
        assert len(history) > 1
        assert never_rises(history, energy)
    frozen = projections({"m": (24, 24)}, 40, 0)
    for rank in (1, 8, 40):
        scales, history = fit_scales(terms[0], frozen.b[:, :rank], FrozenSide.of(frozen.a[:rank]))
        assert len(history) > 1
        assert never_rises(history, energy)
        made = scales.delta(Factors(frozen.b[:, :rank].double(), frozen.a[:rank].double()))
        lost = float((terms[0].b.double() @ terms[0].a.double() - made.b @ made.a).square().sum())
        assert lost == pytest.approx(history[-1], rel=1e-6)
    name = tied_names[0]
    for unshared, shared in ((0, 2), (2, 4), (0, 5)):
        svd = source.svds[name].truncate([terms[0]], unshared + shared)
        chunks, history = fit_chunks(terms[0], svd, unshared, shared, 0)
        assert len(history) > 1
        assert never_rises(history, energy)
        made = chunks.delta()
        lost = float((terms[0].b.double() @ terms[0].a.double() - made.b @ made.a).square().sum())
        assert lost == pytest.approx(history[-1], rel=1e-6)
