"""One group's updates: never a rise of its objective, and the exact optimum where a closed form exists."""

from collections.abc import Sequence

import pytest
import torch

from bslora_convert.bslora.transforms import Kronecker, Slice
from bslora_convert.fit import shared
from bslora_convert.fit.residual import Member, Own, Sum
from bslora_convert.modules.factors import Factors

SHAPES = [(64, 64), (32, 64), (128, 64), (64, 128)]


def residuals(shapes: Sequence[tuple[int, int]], seed: int = 0) -> list[Sum]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        Sum([Factors(random(n, 4), random(4, d)), Factors(random(n, 2), random(2, d))], random(6, 6)) for n, d in shapes
    ]


def dense(value: Sum | Factors) -> torch.Tensor:
    if isinstance(value, Factors):
        return value.b @ value.a
    b, a = torch.cat([term.b for term in value.terms], 1), torch.cat([term.a for term in value.terms], 0)
    return b @ value.core @ a


def objective(transform: Kronecker | Slice, members: Sequence[Member], pair: Factors, owns: Sequence[Own]) -> float:
    return sum(
        float((dense(m.residual()) - dense(transform.factors(pair, own, m.shape))).square().sum())
        for m, own in zip(members, owns, strict=True)
    )


def members_of(shapes: Sequence[tuple[int, int]], owns: Sequence[Own] | None = None, seed: int = 0) -> list[Member]:
    terms = residuals(shapes, seed)
    return [
        Member(shape, owns[i] if owns else {}, lambda i=i: terms[i])  # type: ignore[misc]
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize(
    ("transform", "kernel_rank", "rank"),
    [
        (Kronecker(16), 1, 3),
        (Kronecker(16), 3, 1),
        (Kronecker(20), 1, 3),
        (Kronecker(20), 2, 2),
        (Kronecker(48), 1, 2),
        (Slice(128, 128), 1, 3),
        (Slice(128, 128, "bottom-right"), 1, 1),
    ],
)
def test_rounds_never_raise_the_objective(transform: Kronecker | Slice, kernel_rank: int, rank: int) -> None:
    members = members_of(SHAPES)
    energy = sum(float(dense(m.residual()).square().sum()) for m in members)
    result = shared.start(transform, members, rank, kernel_rank, torch.Generator().manual_seed(0))
    before = objective(transform, members, result.pair, result.owns)
    assert before < energy
    for _ in range(8):
        members = members_of(SHAPES, result.owns)
        result = shared.update(transform, members, result.pair, kernel_rank)
        after = objective(transform, members, result.pair, result.owns)
        assert after <= before * (1 + 1e-10)
        before = after


def test_slice_of_one_shape_is_the_truncated_svd_of_the_mean() -> None:
    shapes = [(12, 10)] * 3
    members = members_of(shapes)
    transform = Slice(12, 10)
    result = shared.start(transform, members, 2, 1, torch.Generator().manual_seed(0))
    for _ in range(200):
        result = shared.update(transform, members, result.pair, 1)
    mean = sum(dense(m.residual()) for m in members) / 3
    u, s, vh = torch.linalg.svd(mean)
    expected = u[:, :2] * s[:2] @ vh[:2]
    assert torch.allclose(dense(result.pair), expected, atol=1e-6)


def test_kronecker_pair_step_is_the_truncation_of_the_weighted_mean_of_blocks() -> None:
    transform, members = Kronecker(16), members_of(SHAPES)
    first = shared.start(transform, members, 2, 1, torch.Generator().manual_seed(1))
    result = shared.update(transform, members_of(SHAPES, first.owns), first.pair, 1)
    total, weight = torch.zeros(16, 16, dtype=torch.float64), 0.0
    for member, own in zip(members, result.owns, strict=True):
        kernel, matrix = own["B"] @ own["A"], dense(member.residual())
        for i in range(kernel.shape[0]):
            for j in range(kernel.shape[1]):
                total += kernel[i, j] * matrix[16 * i : 16 * i + 16, 16 * j : 16 * j + 16]
        weight += float(kernel.square().sum())
    u, s, vh = torch.linalg.svd(total / weight)
    assert torch.allclose(dense(result.pair), u[:, :2] * s[:2] @ vh[:2], atol=1e-9)
    assert result.headroom == pytest.approx(weight * float(s[2:4].square().sum()), rel=1e-6)


def test_kronecker_kernels_are_the_best_of_their_rank() -> None:
    """Against the dense problem: C / |P|^2 truncated, so no random perturbation may do better."""
    transform, members = Kronecker(16), members_of(SHAPES[:1])
    result = shared.start(transform, members, 2, 2, torch.Generator().manual_seed(2))
    own = shared._kernels(transform, members[0], members[0].residual(), result.pair, 2)
    best = objective(transform, members, result.pair, [own])
    generator = torch.Generator().manual_seed(3)
    for scale in (1e-3, 1e-1):
        for _ in range(20):
            moved = {
                name: tensor + scale * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
                for name, tensor in own.items()
            }
            assert objective(transform, members, result.pair, [moved]) >= best - 1e-9


def test_a_group_of_zero_deltas_stays_zero() -> None:
    zero = Sum([Factors(torch.zeros(64, 2), torch.zeros(2, 64))], torch.eye(2))
    for transform in (Kronecker(16), Kronecker(20), Slice(64, 64)):
        members = [Member((64, 64), {}, lambda: zero)] * 2
        result = shared.start(transform, members, 2, 1, torch.Generator().manual_seed(0))
        for own in result.owns:
            term = transform.factors(result.pair, own, (64, 64))
            assert torch.equal(term.b @ term.a, torch.zeros(64, 64))


def test_a_sum_multiplies_as_its_matrix_does() -> None:
    (whole,) = residuals([(12, 10)])
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.randn(12, 3, dtype=torch.float64)
    assert torch.allclose(whole.times(x), dense(whole) @ x)
    assert torch.allclose(whole.transposed.times(y), dense(whole).T @ y)
    assert whole.transposed.shape == (10, 12)
