"""What every form has in common: budgets, storage, determinism; and the closed forms against dense float64."""

from dataclasses import replace

import pytest
import torch

from bslora_convert.baselines import BASELINES, OutOfReach
from bslora_convert.baselines.baseline import kinds, rounded
from bslora_convert.fit import allocate
from bslora_convert.lora import load_lora
from bslora_convert.lora.writer import save_lora
from tests.baselines.planted import KINDS, LAYERS, dense, names, random_source, relative_error

BUDGETS = (640, 1000, 1500)


@pytest.mark.parametrize("form", BASELINES)
def test_the_budget_is_never_exceeded(form: str) -> None:
    source = random_source()
    errors = []
    for budget in BUDGETS:
        fitted = BASELINES[form](source, budget, torch.float32, 0)
        assert 0 < fitted.parameters <= budget
        errors.append(relative_error(source, fitted))
    assert errors[-1] < 1
    if form != "vera":  # another rank draws other random matrices
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("form", BASELINES)
def test_a_budget_that_is_too_small(form: str) -> None:
    with pytest.raises(OutOfReach, match="budget is 20"):
        BASELINES[form](random_source(), 20, torch.float32, 0)


@pytest.mark.parametrize("form", BASELINES)
def test_deltas_are_made_of_the_stored_numbers_and_a_seed_decides_all(form: str) -> None:
    source = random_source()
    fitted, again = (BASELINES[form](source, 1000, torch.bfloat16, 3) for _ in range(2))
    for name, delta in fitted.deltas.items():
        assert delta.shape == source.shapes[name]
        assert delta.b.dtype == torch.float32
        assert torch.equal(delta.b, again.deltas[name].b)
        assert torch.equal(delta.a, again.deltas[name].a)
    if form.startswith(("svd", "share")):
        assert all(torch.equal(d.a, rounded(d.a, torch.bfloat16)) for d in fitted.deltas.values())
    exact = BASELINES[form](source, 1000, torch.float32, 3)
    assert relative_error(source, fitted) == pytest.approx(relative_error(source, exact), abs=5e-3)


def best_error(matrices: list[torch.Tensor], rank: int) -> float:
    return sum(float(torch.linalg.svdvals(matrix)[rank:].square().sum()) for matrix in matrices)


def stacks(form: str) -> list[torch.Tensor]:
    """What the closed form truncates."""
    source = random_source()
    whole = {name: dense(delta.factors()) for name, delta in source.deltas.items()}
    if form.startswith("svd"):
        return list(whole.values())
    if form == "sharelora_a_qkv":
        tied = [name for name in whole if name.endswith(("q_proj", "k_proj"))]
        return [torch.cat([whole[name] for name in tied])] + [whole[name] for name in whole if name not in tied]
    groups = [[whole[name] for name in members] for members in kinds(source).values()]
    if form == "sharelora_a":
        return [torch.cat(group) for group in groups]
    if form == "sharelora_b":
        return [torch.cat(group, dim=1) for group in groups]
    return [torch.stack(group).mean(0) for group in groups]


@pytest.mark.parametrize("form", ["svd_uniform", "sharelora_a", "sharelora_b", "sharelora_a_qkv"])
def test_closed_forms_equal_dense_ones(form: str) -> None:
    source = random_source()
    fitted = BASELINES[form](source, 1000, torch.float32, 0)
    best = (best_error(stacks(form), fitted.settings["rank"]) / source.energy) ** 0.5
    assert relative_error(source, fitted) == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("form", ["sharelora_ab", "tied_lora_tl5"])
def test_one_update_for_all_layers_is_the_truncated_mean(form: str) -> None:
    source = random_source()
    fitted = BASELINES[form](source, 600, torch.float32, 0)
    rank = fitted.settings["rank"]
    for members, mean in zip(kinds(source).values(), stacks(form), strict=True):
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        best = u[:, :rank] * s[:rank] @ v[:rank]
        for name in members:
            assert torch.allclose(dense(fitted.deltas[name]), best, atol=1e-4)


def test_adaptive_ranks_are_the_allocation() -> None:
    source = random_source()
    fitted = BASELINES["svd_adaptive"](source, 1000, torch.float32, 0)
    ranks = allocate.within_budget(source.spectra, source.costs, 1000)
    assert {name: delta.rank for name, delta in fitted.deltas.items()} == ranks
    expected = (allocate.lost_energy(source.spectra, ranks) / source.energy) ** 0.5
    assert relative_error(source, fitted) == pytest.approx(expected, rel=1e-5)


def test_truncation_is_saved_as_a_plain_lora(tmp_path) -> None:
    source = random_source()
    fitted = BASELINES["svd_adaptive"](source, 300, torch.float32, 0)
    assert fitted.save is None
    assert min(delta.rank for delta in fitted.deltas.values()) == 0
    kinds = {name: source.kind(name) for name in fitted.deltas}
    save_lora(tmp_path, fitted.deltas, kinds, {}, {"task_type": "CAUSAL_LM"}, torch.float32)
    read = load_lora(tmp_path)
    assert set(read.modules) == set(names())
    for name, module in read.modules.items():
        assert torch.allclose(dense(module.factors()), dense(fitted.deltas[name]))


def test_no_projections_to_share() -> None:
    source = random_source()
    down = {name: delta for name, delta in source.deltas.items() if name.endswith("down_proj")}
    with pytest.raises(OutOfReach, match="query, key or value"):
        BASELINES["sharelora_a_qkv"](replace(source, deltas=down), 10_000, torch.float32, 0)


def test_a_shared_factor_counts_once() -> None:
    source = random_source()
    fitted = BASELINES["sharelora_a"](source, 1000, torch.float32, 0)
    rank = fitted.settings["rank"]
    assert fitted.parameters == rank * sum(width + LAYERS * out for out, width in KINDS.values())
    assert len({delta.a.data_ptr() for delta in fitted.deltas.values()}) == len(KINDS)
