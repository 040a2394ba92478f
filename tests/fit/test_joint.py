"""Bases of one module for several adapters, against dense float64 and against structures whose bases are known."""

import pytest
import torch
from torch import Tensor

from bslora_convert.bslora.bases import Basis
from bslora_convert.fit.gain import Strength
from bslora_convert.fit.joint import ROUNDINGS, Target, core_of, rounding, shared_basis, take
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.lowrank import Grams, product_svd

SHAPE: Shape = (60, 40)
RANK = 5
COUNT = 6


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates(left: bool, right: bool, shape: Shape = SHAPE) -> list[Factors]:
    """Updates whose column or row spaces are the same, and nothing else is."""
    found = []
    for number in range(1, COUNT + 1):
        b = random(1, shape[0], RANK) @ random(10 + number, RANK, RANK) if left else random(20 + number, shape[0], RANK)
        a = (
            random(30 + number, RANK, RANK) @ random(2, RANK, shape[1])
            if right
            else random(40 + number, RANK, shape[1])
        )
        found.append(Factors(b, a))
    return found


def targets(products: list[Factors], rank: int, dtype: torch.dtype = torch.float32) -> list[Target]:
    """Updates that truncated SVD of a rank was made of."""
    return [Target.of(p, product_svd(Grams.of(p)).truncate([p], rank).to(dtype)) for p in products]


def shared(own: list[Target], dtype: torch.dtype, slack: float) -> tuple[Basis, list[tuple[Tensor, Factors]]]:
    """The bases of targets, and what each takes of them, with an error that is allowed, but for a share of it."""
    basis = shared_basis(own, dtype)
    assert basis is not None
    found = []
    for target in own:
        taken = take(target, basis)
        assert taken is not None
        assert dense_error(target, taken[1]) <= target.allowed * (1 + slack)
        found.append(taken)
    return basis, found


def dense_error(target: Target, approximation: Factors) -> float:
    exact = target.factors.b @ target.factors.a
    return float((exact - approximation.b.double() @ approximation.a.double()).square().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("left", "right"), [(True, True), (True, False), (False, True)])
def test_planted_bases_are_found_at_their_own_rank(left: bool, right: bool, dtype: torch.dtype) -> None:
    own = targets(updates(left, right), RANK, dtype)
    basis, found = shared(own, dtype, 0.01)
    assert (basis.sizes.left, basis.sizes.right) == (RANK * left, RANK * right)
    for core, local in found:
        assert tuple(core.shape) == basis.sizes.core(SHAPE)
        assert local.rank == RANK


@pytest.mark.parametrize("shape", [(256, 24), (24, 256)])
def test_no_basis_of_one_side_raises_a_rank(shape: Shape) -> None:
    common = random(1, max(shape), 8)
    products = []
    for number in range(8):
        long, short = common @ random(10 + number, 8, RANK), random(20 + number, RANK, min(shape))
        products.append(Factors(long, short) if shape[0] > shape[1] else Factors(short.T, long.T))
    own = targets(products, RANK)
    basis = shared_basis(own, torch.float32)
    if basis is not None:
        assert all(taken is None or taken[1].rank <= RANK for taken in (take(target, basis) for target in own))
        assert basis.sizes.left and basis.sizes.right


def test_no_adapter_loses_more_than_it_does_alone() -> None:
    own = targets(updates(True, True), 3)
    basis, _ = shared(own, torch.float32, 1e-9)
    separate = sum(target.separate for target in own)
    assert basis.parameters + COUNT * basis.sizes.left * basis.sizes.right < separate


@pytest.mark.parametrize("rank", [1, 3])
def test_what_is_shared_is_as_strong_as_it_was_alone(rank: int) -> None:
    own = []
    for product in updates(True, True):
        fitted = product_svd(Grams.of(product)).truncate([product], rank)
        strong = Factors(fitted.b * Strength.of(product, fitted).scale, fitted.a)
        own.append(Target.of(product, strong.to(torch.float32)))
        assert own[-1].along == pytest.approx(own[-1].energy, rel=1e-4)
        assert own[-1].fitted < own[-1].allowed  # an unbiased part loses more than one of least error that is behind it
    _, found = shared(own, torch.float32, 1e-6)
    for target, (_, local) in zip(own, found, strict=True):
        exact = target.factors.b @ target.factors.a
        along = float((exact * (local.b.double() @ local.a.double())).sum())
        assert along == pytest.approx(target.energy, rel=2e-3)


def test_turned_bases_are_no_dearer_than_any_pair_of_the_higher_order_svd() -> None:
    noisy = [
        Factors(torch.cat([p.b, 0.3 * random(50 + i, SHAPE[0], 3)], 1), torch.cat([p.a, random(60 + i, 3, SHAPE[1])]))
        for i, p in enumerate(updates(True, True))
    ]
    own = targets(noisy, 4)
    basis = shared_basis(own, torch.float32)
    assert basis is not None
    scaled = [t.factors.b @ t.factors.a / t.allowed**0.5 for t in own]
    left = torch.linalg.svd(torch.cat(scaled, 1))[0]
    right = torch.linalg.svd(torch.cat(scaled, 0))[2]
    cheapest = min(
        p * SHAPE[0] + q * SHAPE[1] + COUNT * p * q
        for p in range(1, 25)
        for q in range(1, 25)
        if all((x - left[:, :p] @ (left[:, :p].T @ x @ right[:q].T) @ right[:q]).square().sum() <= 1 for x in scaled)
    )
    rows, columns = basis.sizes.core(SHAPE)
    assert basis.parameters + COUNT * rows * columns <= cheapest


def test_unrelated_updates_share_nothing_and_nothing_breaks_at_the_edges() -> None:
    wide = (400, 300)
    assert shared_basis(targets(updates(False, False, wide), RANK), torch.float32) is None
    assert shared_basis(targets(updates(False, False, wide), 2), torch.float32) is None
    same = targets(updates(True, True), RANK)
    assert shared_basis(same[:1], torch.float32) is None
    nothing = Factors(torch.zeros(SHAPE[0], 2), torch.zeros(2, SHAPE[1]))
    empty = Target.of(nothing, nothing)
    assert shared_basis([empty, empty], torch.float32) is None
    basis = shared_basis([*same, empty], torch.float32)
    assert basis is not None
    taken = take(empty, basis)
    assert taken is not None and not taken[0].any()
    stranger = targets(updates(False, False), RANK)[0]
    assert take(stranger, basis) is None


def test_cores_are_least_squares_in_bases_that_are_not_orthonormal() -> None:
    from bslora_convert.bslora.bases import Basis

    (target,) = targets(updates(False, False)[:1], RANK)
    basis = Basis(random(70, SHAPE[0], 7), random(71, 6, SHAPE[1]))
    assert basis.left is not None and basis.right is not None
    exact = torch.linalg.pinv(basis.left) @ (target.factors.b @ target.factors.a) @ torch.linalg.pinv(basis.right)
    assert torch.allclose(core_of(target, basis), exact, rtol=1e-9, atol=1e-9)


def test_rounding_alone_is_no_larger_than_what_is_allowed_for_it() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        (target,) = targets(updates(True, True)[:1], RANK, dtype)
        assert target.allowed == ROUNDINGS * rounding(dtype) * target.energy
