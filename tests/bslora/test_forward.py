"""The structured forward pass is the expanded one, for any shape, and lets gradients through."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bslora_convert.bslora.forward import add_lookup, add_update, dense
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice, Transform
from bslora_convert.modules.factors import Factors

SIDES = st.integers(1, 11)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(["ke", "ss", "gt"]), out=SIDES, width=SIDES, size=SIDES, rows=st.integers(0, 5),
    rank=st.integers(0, 3), pair_rank=st.integers(1, 3), kernel_rank=st.integers(1, 3),
    window=st.sampled_from(["center", "top-left", "bottom-right"]),
)  # fmt: skip
def test_every_term_is_what_its_factors_say(
    name: str, out: int, width: int, size: int, rows: int, rank: int, pair_rank: int, kernel_rank: int, window: str
) -> None:
    transform: Transform = {
        "ke": Kronecker(size),
        "ss": Slice(out + size, width + size, window),
        "gt": Gate(size),
    }[name]
    pair_out, pair_in = transform.pair_sizes
    pair = Factors(random(pair_out, pair_rank), random(pair_rank, pair_in))
    own = {key: random(*shape) for key, shape in transform.own_shapes((out, width), kernel_rank).items()}
    local = Factors(random(out, rank), random(rank, width))
    second = Factors(random(pair_out, 1), random(1, pair_in))
    kept = {key: random(*shape) for key, shape in transform.own_shapes((out, width), 1).items()}
    expected = local.b @ local.a
    for used in ((pair, own), (second, kept)):
        term = transform.factors(*used, (out, width))
        expected = expected + term.b @ term.a
    x, y = random(2, rows, width), random(2, rows, out)
    uses = [(pair, own), (second, kept)]
    torch.testing.assert_close(dense(local, transform, uses), expected)
    torch.testing.assert_close(add_update(y, x, local, transform, uses), y + x @ expected.T)
    with torch.no_grad():
        torch.testing.assert_close(add_update(y.clone(), x, local, transform, uses), y + x @ expected.T)
    ids = torch.randint(width, (2, rows))
    torch.testing.assert_close(add_lookup(y, ids, local, transform, uses), y + expected.T[ids])


def test_a_transposed_input_and_a_cut_output() -> None:
    x, y = random(4, 10).T, random(7, 10).T
    transform, pair = Kronecker(3), Factors(random(3, 2), random(2, 3))
    own = {"A": random(2, 2), "B": random(3, 2)}
    term = transform.factors(pair, own, (7, 4))
    torch.testing.assert_close(transform.add_(y.clone(), x, [(pair, own)]), y + x @ (term.b @ term.a).T)


@pytest.mark.parametrize("transform", [Kronecker(3), Slice(6, 9), Gate(5)])
def test_gradients_are_those_of_the_expanded_product(transform: Transform) -> None:
    rows, columns = transform.pair_sizes
    pair = Factors(random(rows, 2).requires_grad_(), random(2, columns).requires_grad_())
    own = {key: random(*shape).requires_grad_() for key, shape in transform.own_shapes((6, 9), 2).items()}
    x, y, weight = random(4, 9).requires_grad_(), random(4, 6), random(4, 6)
    inputs = [x, pair.b, pair.a, *own.values()]
    structured = torch.autograd.grad((transform.add_(y.clone(), x, [(pair, own)]) * weight).sum(), inputs)
    term = transform.factors(pair, own, (6, 9))
    expanded = torch.autograd.grad(((y + x @ (term.b @ term.a).T) * weight).sum(), inputs)
    for first, second in zip(structured, expanded, strict=True):
        torch.testing.assert_close(first, second)


def test_the_result_has_the_type_of_the_base_output() -> None:
    local = Factors(torch.randn(6, 2), torch.randn(2, 9))
    y, x = torch.randn(3, 6).bfloat16(), torch.randn(3, 9).bfloat16()
    result = add_update(y, x, local, None, [])
    assert result.dtype == torch.bfloat16
    # Added in the factors' float32 and rounded once.
    assert torch.equal(result, (y.float() + (x.float() @ local.a.T) @ local.b.T).bfloat16())
