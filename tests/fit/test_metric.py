"""The completed metric against dense float64, and codes that are fitted in it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bslora_convert.coding.form import code_form
from bslora_convert.fit.convert import Source, fit_by_hand, measure
from bslora_convert.metric.metric import Moments, metric_of, output_metric
from bslora_convert.modules.factors import Factors, add
from bslora_convert.recipe.structure import Structure
from bslora_convert.recipe.target import Target
from tests.planting import random_products

IN_CODES = Target(bytes=0, unbiased=False)  # the bits are given beside it


def moments_of(factors: Factors, x: Tensor, g: Tensor | None = None) -> Moments:
    """x (in, n), g (out, n): samples as columns."""
    z = factors.a.double() @ x
    found = Moments(z @ z.T / x.shape[1], float(x.square().sum()) / x.shape[1])
    if g is None:
        return found
    w = factors.b.double().T @ g
    return replace(found, outputs=w @ w.T / g.shape[1], output_power=float(g.square().sum()) / g.shape[1])


def samples(size: int, seed: int) -> Tensor:
    """Directions that differ a hundredfold in size."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    scale = torch.logspace(0, -2, size, dtype=torch.float64)
    return mixing @ (scale[:, None] * torch.randn(size, 4 * size, generator=generator, dtype=torch.float64))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 24), st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_it_agrees_on_the_factors_and_has_the_trace(
    out: int, width: int, rank: int, dependent: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    factors = Factors(
        torch.randn(out, rank, generator=generator).double(), torch.randn(rank, width, generator=generator).double()
    )
    if dependent:
        factors = add(factors, factors)
    x, g = samples(width, seed), samples(out, seed + 1)
    metric = metric_of(factors, moments_of(factors, x, g))
    for weigh, rows, seen in ((metric.right, factors.a, x), (metric.left, factors.b.T, g)):
        true = seen @ seen.T / seen.shape[1]
        root = weigh(torch.eye(len(seen), dtype=torch.float64))
        torch.testing.assert_close(root, root.T, rtol=0, atol=1e-7)
        completed = root @ root
        torch.testing.assert_close(rows @ completed @ rows.T, rows @ true @ rows.T, rtol=1e-6, atol=1e-6)
        if len(seen) > torch.linalg.matrix_rank(rows):
            assert float(completed.trace()) == pytest.approx(float(true.trace()), rel=1e-6)


def in_metric(deltas: Any, x: Mapping[str, Tensor], g: Mapping[str, Tensor] | None = None) -> Source:
    """The source measured in the metric of these samples."""
    moments = {name: moments_of(delta.factors(), x[name], (g or {}).get(name)) for name, delta in deltas.items()}
    return measure(deltas, metrics={name: metric_of(d.factors(), moments[name]) for name, d in deltas.items()})


@pytest.mark.parametrize("transform", ["none", "ke"])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("width", [None, 4])
def test_codes_of_as_many_bits_lose_less_in_the_metric(transform: str, two_sided: bool, width: int | None) -> None:
    deltas = random_products(layers=2, rank=8)
    source = measure(deltas)
    options = Structure(transform=transform, local_ranks="uniform", shared_size=32 if transform == "ke" else None)
    floats = fit_by_hand(source, options, (8, 1, 1) if transform == "ke" else (8, 0, 0)).form
    bits = 3 * floats.parameters
    plain = code_form(source, floats, replace(IN_CODES, width=width), torch.float32, bits=bits)
    x = {name: samples(delta.shape[1], 1) for name, delta in deltas.items()}
    g = {name: samples(delta.shape[0], 2) for name, delta in deltas.items()} if two_sided else {}
    coded = code_form(in_metric(deltas, x, g), floats, replace(IN_CODES, width=width), torch.float32, bits=bits)
    assert coded.bits <= bits
    assert set(coded.tensors) == set(plain.tensors)

    def lost(form: object) -> float:
        total = 0.0
        for name, delta in deltas.items():
            held = delta.factors()
            rest = held.b.double() @ held.a.double()
            found = form.delta(name)  # type: ignore[attr-defined]
            rest -= found.b.double() @ found.a.double()
            rest = rest @ x[name] / x[name].shape[1] ** 0.5
            if two_sided:
                rest = g[name].T @ rest / g[name].shape[1] ** 0.5
            total += float(rest.square().sum())
        return total

    assert lost(coded.form) < 0.9 * lost(plain.form)


def test_ranks_that_are_given_stay() -> None:
    deltas = random_products(layers=1, rank=8)
    floats = fit_by_hand(measure(deltas), Structure(transform="none", local_ranks="uniform"), (3, 0, 0)).form
    ranks = dict.fromkeys(deltas, 3)
    source = in_metric(deltas, {name: samples(delta.shape[1], 1) for name, delta in deltas.items()})
    coded = code_form(source, floats, replace(IN_CODES, bytes=None, numbers=0, width=4), torch.float32)
    assert {name: module.local.rank for name, module in coded.form.modules.items()} == ranks


def test_white_inputs_change_nothing_but_the_components_that_are_equally_good() -> None:
    deltas = random_products(layers=1, rank=6)
    source = measure(deltas)
    floats = fit_by_hand(source, Structure(transform="none", local_ranks="uniform"), (6, 0, 0)).form
    plain = code_form(source, floats, IN_CODES, torch.float32, bits=3 * floats.parameters)
    white = {n: torch.eye(delta.shape[1], dtype=torch.float64) * delta.shape[1] ** 0.5 for n, delta in deltas.items()}
    coded = code_form(in_metric(deltas, white), floats, IN_CODES, torch.float32, bits=plain.bits)
    assert coded.lost == pytest.approx(plain.lost, rel=0.01)


def test_modules_that_are_never_fed_take_no_bits() -> None:
    deltas = random_products(layers=1, rank=6)
    silent, *fed = deltas
    x = {name: samples(delta.shape[1], 1) for name, delta in deltas.items()}
    x[silent] = torch.zeros_like(x[silent])
    floats = fit_by_hand(measure(deltas), Structure(transform="none", local_ranks="uniform"), (6, 0, 0)).form
    coded = code_form(in_metric(deltas, x), floats, IN_CODES, torch.float32, bits=3 * floats.parameters)
    assert coded.form.modules[silent].local.rank == 0
    assert all(coded.form.modules[name].local.rank for name in fed)
    assert all(tensor.isfinite().all() for tensor in coded.form.tensors())


def test_the_metric_of_outputs_is_what_noise_in_all_inputs_does() -> None:
    """E(gᵀNx)² of N with entries of one variance, within the rows of N that the columns of B span."""
    generator = torch.Generator().manual_seed(0)
    factors = Factors(torch.randn(7, 3, generator=generator), torch.randn(3, 5, generator=generator))
    x = torch.randn(5, 200, generator=generator).double()
    g = samples(7, 3)[:, :1] * torch.randn(1, 200, generator=generator) + torch.randn(7, 200, generator=generator)
    g = factors.b.double() @ torch.linalg.pinv(factors.b.double()) @ g
    power = x.square().sum(0)
    moments = replace(
        moments_of(factors, x, g),
        fed=(factors.b.double().T @ g * power) @ (factors.b.double().T @ g).T / 200,
        fed_power=float((power * g.square().sum(0)).sum()) / 200,
    )
    noise = Factors(factors.b, torch.randn(3, 5, generator=generator))
    found = output_metric(factors, moments).weighed(noise)
    dense = noise.b.double() @ noise.a.double()
    expected = float(((dense.T @ g).square().sum(0) * power).sum()) / 200 / 5
    assert float((found.b @ found.a).square().sum()) == pytest.approx(expected, rel=1e-4)
