"""The calibrated fit is the best local fit in its metric, against dense float64."""

import pytest
import torch
from torch import Tensor

from bslora_convert.bslora.form import BsloraForm, Module
from bslora_convert.bslora.transforms import Kronecker
from bslora_convert.fit.calibrated import refit_locals, residual_terms
from bslora_convert.fit.convert import Options, fit_by_hand, measure
from bslora_convert.metric.metric import Moments
from bslora_convert.modules.factors import Factors
from tests.planting import Product, plant, random_products


def dense(factors: Factors) -> Tensor:
    return factors.b.double() @ factors.a.double()


def moments_of(
    terms: dict[str, list[Factors]], inputs: dict[str, Tensor], gradients: dict[str, Tensor] | None = None
) -> dict[str, Moments]:
    found = {}
    for name, parts in terms.items():
        a = torch.cat([part.a for part in parts]).double()
        z = a @ inputs[name]
        outputs = None
        if gradients is not None:
            w = torch.cat([part.b for part in parts], 1).double().T @ gradients[name]
            outputs = w @ w.T / gradients[name].shape[1]
        found[name] = Moments(z @ z.T / z.shape[1], 0.0, outputs)
    return found


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


@pytest.mark.parametrize("transform", ["none", "ke"])
@pytest.mark.parametrize("two_sided", [False, True])
def test_no_local_part_of_its_rank_is_better(transform: str, two_sided: bool) -> None:
    deltas = random_products(layers=2, rank=6)
    ranks = (2, 1, 2) if transform == "ke" else (2, 0, 0)
    form = fit_by_hand(measure(deltas), Options(transform=transform, uniform=True, shared_size=32), ranks).form
    terms = residual_terms(deltas, form)
    inputs = samples({name: delta.shape[1] for name, delta in deltas.items()}, 1)
    gradients = samples({name: delta.shape[0] for name, delta in deltas.items()}, 2) if two_sided else None
    refitted = refit_locals(form, terms, moments_of(terms, inputs, gradients), uniform=True)
    assert refitted.parameters == form.parameters
    for name, delta in deltas.items():
        rest = dense(delta.factors()) - sum(
            (dense(part) for level in ("intra", "inter") if (part := form.part(name, level)) is not None),
            start=torch.zeros(delta.shape, dtype=torch.float64),
        )
        x = inputs[name] / inputs[name].shape[1] ** 0.5
        g = (
            gradients[name] / gradients[name].shape[1] ** 0.5
            if gradients is not None
            else torch.eye(delta.shape[0]).double()
        )
        best = torch.linalg.svdvals(g.T @ rest @ x)[2:].square().sum()
        found, before = (
            float((g.T @ (rest - dense(f.modules[name].local)) @ x).square().sum()) for f in (refitted, form)
        )
        assert found == pytest.approx(float(best), rel=1e-4)
        assert found < before


def test_white_inputs_change_nothing() -> None:
    deltas = random_products(layers=1, rank=5)
    form = fit_by_hand(measure(deltas), Options(transform="none", uniform=True), (2, 0, 0)).form
    terms = residual_terms(deltas, form)
    white = {name: torch.eye(delta.shape[1], dtype=torch.float64) for name, delta in deltas.items()}
    refitted = refit_locals(form, terms, moments_of(terms, white), uniform=True)
    for name in deltas:
        torch.testing.assert_close(dense(refitted.delta(name)), dense(form.delta(name)), rtol=1e-4, atol=1e-5)


def test_the_gauge_of_the_source_changes_nothing() -> None:
    deltas = random_products(layers=1, rank=5)
    inputs = samples({name: delta.shape[1] for name, delta in deltas.items()}, 3)
    form = fit_by_hand(measure(deltas), Options(transform="none", uniform=True), (2, 0, 0)).form
    found = []
    for change in (torch.eye(5), torch.randn(5, 5, generator=torch.Generator().manual_seed(4))):
        turned = {
            name: Product(Factors(d.held.b @ torch.linalg.inv(change), change @ d.held.a)) for name, d in deltas.items()
        }
        terms = residual_terms(turned, form)
        found.append(refit_locals(form, terms, moments_of(terms, inputs), uniform=True))
    for name in deltas:
        torch.testing.assert_close(dense(found[0].delta(name)), dense(found[1].delta(name)), rtol=1e-3, atol=1e-3)


def test_ranks_go_where_the_inputs_are() -> None:
    deltas = random_products(layers=2, rank=6, kinds={"self_attn.q_proj": (32, 32)})
    form = fit_by_hand(measure(deltas), Options(transform="none", uniform=True), (3, 0, 0)).form
    terms = residual_terms(deltas, form)
    first, second = deltas
    inputs = {first: torch.eye(32, dtype=torch.float64) * 10, second: torch.eye(32, dtype=torch.float64) * 0.1}
    refitted = refit_locals(form, terms, moments_of(terms, inputs), uniform=False)
    assert (refitted.modules[first].local.rank, refitted.modules[second].local.rank) == (6, 0)
    assert refitted.parameters <= form.parameters


def test_a_module_that_is_never_fed_keeps_factors() -> None:
    form = plant(Kronecker(32), (2, 1, 2), layers=1)
    deltas = {name: Product(form.delta(name)) for name in form.modules}
    terms = residual_terms(deltas, form)
    nothing = {name: Moments(torch.zeros(sum(p.rank for p in parts), sum(p.rank for p in parts)).double(), 0.0)
               for name, parts in terms.items()}  # fmt: skip
    refitted: BsloraForm = refit_locals(form, terms, nothing, uniform=True)
    assert all(tensor.isfinite().all() for tensor in refitted.tensors())
    module: Module = next(iter(refitted.modules.values()))
    assert module.local.rank <= 2
