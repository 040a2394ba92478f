"""Fits in a metric are the best in it, against dense float64."""

import pytest
import torch
from torch import Tensor

from bslora_convert.bslora.form import BsloraForm
from bslora_convert.fit.convert import fit_by_hand, fit_to_budget, measure
from bslora_convert.metric.metric import Metric, Moments, metric_of
from bslora_convert.modules.factors import Factors
from bslora_convert.modules.lowrank import Delta
from bslora_convert.recipe.structure import Structure
from tests.planting import Product, random_products


def dense(factors: Factors) -> Tensor:
    return factors.b.double() @ factors.a.double()


def metrics_of(
    deltas: dict[str, Product], inputs: dict[str, Tensor], gradients: dict[str, Tensor] | None = None
) -> dict[str, Metric]:
    """From samples as columns: x (in, n), g (out, n)."""
    found = {}
    for name, delta in deltas.items():
        factors, x = delta.factors(), inputs[name]
        z = factors.a.double() @ x
        moments = Moments(z @ z.T / x.shape[1], float(x.square().sum()) / x.shape[1])
        if gradients is not None:
            g = gradients[name]
            w = factors.b.double().T @ g
            moments = Moments(
                moments.inputs, moments.input_power, w @ w.T / g.shape[1], float(g.square().sum()) / g.shape[1]
            )
        found[name] = metric_of(factors, moments)
    return found


def root_of(weigh: object, size: int) -> Tensor:
    return weigh(torch.eye(size)).double()  # type: ignore[operator, no-any-return]


def samples(shapes: dict[str, int], seed: int) -> dict[str, Tensor]:
    """Inputs whose directions differ much in size."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, width in shapes.items():
        scale = 0.7 ** torch.arange(width, dtype=torch.float64)
        mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
        found[name] = mixing @ (
            scale[:, None] * torch.randn(width, 3 * width, generator=generator, dtype=torch.float64)
        )
    return found


def widths(deltas: dict[str, Product], side: int) -> dict[str, int]:
    return {name: delta.shape[side] for name, delta in deltas.items()}


@pytest.mark.parametrize("transform", ["none", "ke", "gt"])
@pytest.mark.parametrize("two_sided", [False, True])
def test_no_local_part_of_its_rank_is_better(transform: str, two_sided: bool) -> None:
    deltas = random_products(layers=2, rank=6)
    ranks = (2, 0, 0) if transform == "none" else (2, 1, 2)
    options = Structure(transform=transform, local_ranks="uniform", shared_size=None if transform == "none" else 32)
    gradients = samples(widths(deltas, 0), 2) if two_sided else None
    metrics = metrics_of(deltas, samples(widths(deltas, 1), 1), gradients)
    plain = fit_by_hand(measure(deltas), options, ranks).form
    fit = fit_by_hand(measure(deltas, metrics=metrics), options, ranks)
    assert fit.form.parameters == plain.parameters
    total = 0.0
    for name, delta in deltas.items():
        out, width = delta.shape
        left, right = root_of(metrics[name].left, out), root_of(metrics[name].right, width)

        def lost(form: BsloraForm, name: str = name, left: Tensor = left, right: Tensor = right) -> float:
            whole = dense(deltas[name].factors()) - dense(form.delta(name))
            return float((left @ whole @ right).square().sum())

        shared = [part for level in ("intra", "inter") if (part := fit.form.part(name, level)) is not None]
        rest = dense(delta.factors()) - sum(map(dense, shared), start=torch.zeros(out, width, dtype=torch.float64))
        best = torch.linalg.svdvals(left @ rest @ right)[2:].square().sum()
        assert lost(fit.form) == pytest.approx(float(best), rel=1e-3)
        assert lost(fit.form) < lost(plain)
        total += lost(fit.form)
    assert fit.lost == pytest.approx(total, rel=1e-3)


def test_white_inputs_change_nothing() -> None:
    deltas = random_products(layers=1, rank=5)
    options = Structure(transform="none", local_ranks="uniform")
    white = {name: torch.eye(width, dtype=torch.float64) * width**0.5 for name, width in widths(deltas, 1).items()}
    plain = fit_by_hand(measure(deltas), options, (2, 0, 0)).form
    found = fit_by_hand(measure(deltas, metrics=metrics_of(deltas, white)), options, (2, 0, 0)).form
    for name in deltas:
        torch.testing.assert_close(dense(found.delta(name)), dense(plain.delta(name)), rtol=1e-4, atol=1e-5)


def test_the_gauge_of_the_source_changes_nothing() -> None:
    deltas = random_products(layers=1, rank=5)
    inputs = samples(widths(deltas, 1), 3)
    found = []
    for change in (torch.eye(5), torch.randn(5, 5, generator=torch.Generator().manual_seed(4))):
        turned = {
            name: Product(Factors(d.held.b @ torch.linalg.inv(change), change @ d.held.a)) for name, d in deltas.items()
        }
        source = measure(turned, metrics=metrics_of(turned, inputs))
        found.append(fit_by_hand(source, Structure(transform="none", local_ranks="uniform"), (2, 0, 0)).form)
    for name in deltas:
        torch.testing.assert_close(dense(found[0].delta(name)), dense(found[1].delta(name)), rtol=1e-3, atol=1e-3)


def test_ranks_go_where_the_inputs_are() -> None:
    deltas = random_products(layers=2, rank=6, kinds={"self_attn.q_proj": (32, 32)})
    first, second = deltas
    inputs = {first: torch.eye(32, dtype=torch.float64) * 10, second: torch.eye(32, dtype=torch.float64) * 0.1}
    source = measure(deltas, metrics=metrics_of(deltas, inputs))
    form = fit_to_budget(source, Structure(transform="none"), 6 * 64).form
    assert (form.modules[first].local.rank, form.modules[second].local.rank) == (6, 0)


@pytest.mark.parametrize("transform", ["none", "ke"])
def test_a_module_that_is_never_fed_keeps_finite_factors(transform: str) -> None:
    deltas: dict[str, Delta] = dict(random_products(layers=1, rank=4))
    nothing = {name: metric_of(d.factors(), Moments(torch.zeros(4, 4).double(), 0.0)) for name, d in deltas.items()}
    options = Structure(transform=transform, local_ranks="uniform", shared_size=32 if transform == "ke" else None)
    fit = fit_by_hand(measure(deltas, metrics=nothing), options, (2, 1, 1) if transform == "ke" else (2, 0, 0))
    assert all(tensor.isfinite().all() for tensor in fit.form.tensors())
