"""Each transform against a straightforward module, and its two maps against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bslora_convert.bslora.transforms import Gate, Kronecker, Slice
from bslora_convert.bslora.transforms.kronecker import split_rank
from bslora_convert.bslora.transforms.slice import WINDOWS
from bslora_convert.modules.factors import Factors


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_kronecker_is_the_kronecker_product() -> None:
    transform = Kronecker(16)
    pair = Factors(random(16, 3), random(3, 16))
    own = {"A": random(1, 4), "B": random(10, 1)}
    term = transform.factors(pair, own, (160, 64))
    expected = torch.kron(own["B"], pair.b) @ torch.kron(own["A"], pair.a)
    assert torch.allclose(term.b @ term.a, expected)
    # The mixed-product identity: a grid of scaled copies of one block.
    assert torch.allclose(term.b @ term.a, torch.kron(own["B"] @ own["A"], pair.b @ pair.a))


def test_kronecker_cuts_the_copies_at_the_edge() -> None:
    transform = Kronecker(16)
    pair = Factors(random(16, 2), random(2, 16))
    own = {"A": random(2, 3), "B": random(5, 2)}
    term = transform.factors(pair, own, (70, 41))
    whole = torch.kron(own["B"] @ own["A"], pair.b @ pair.a)
    assert term.shape == (70, 41)
    assert torch.allclose(term.b @ term.a, whole[:70, :41])


@pytest.mark.parametrize("window", WINDOWS)
def test_slice_is_a_window(window: str) -> None:
    transform = Slice(10, 13, window)
    pair = Factors(random(10, 2), random(2, 13))
    term = transform.factors(pair, {}, (5, 8))
    top, left = {"center": (2, 2), "top-left": (0, 0), "bottom-right": (5, 5)}[window]
    assert torch.equal(term.b, pair.b[top : top + 5])
    assert torch.equal(term.a, pair.a[:, left : left + 8])


def test_gate_follows_the_authors_order_of_steps_and_has_rank_one() -> None:
    transform = Gate(6)
    pair = Factors(random(6, 4), random(4, 6))
    own = {name: random(*shape) for name, shape in transform.own_shapes((7, 9)).items()}
    x = random(9, 5)
    steps = own["input_up"] @ (own["input_down"] @ x)
    steps = own["output_up"] @ (own["output_down"] @ (pair.b @ (pair.a @ steps)))
    term = transform.factors(pair, own, (7, 9))
    assert torch.allclose(term.b @ (term.a @ x), steps)
    assert term.rank == transform.path_rank(4, own) == 1


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 70),
    size=st.integers(1, 20),
    kernel_rank=st.integers(1, 3),
    q=st.integers(1, 4),
    flip=st.booleans(),
)
def test_kronecker_gather_is_the_adjoint_of_spread(
    length: int, size: int, kernel_rank: int, q: int, flip: bool
) -> None:
    transform = Kronecker(size)
    kernel = random(-(-length // size), kernel_rank)
    x = random(size, q)
    y = random(kernel_rank * q, length).T if flip else random(length, kernel_rank * q)
    spread = transform.spread(x, length, kernel)
    gathered = transform.gather(y, size, kernel)
    # <E x, y> taken column block by column block.
    left = (spread * y).sum()
    right = sum((x * gathered[t][:, t * q : (t + 1) * q]).sum() for t in range(kernel_rank))
    assert torch.allclose(left, torch.as_tensor(right))
    cover = transform.coverage(length, size, kernel)
    basis = transform.spread(torch.eye(size, dtype=torch.float64), length, kernel)
    gram = (basis.T @ basis).reshape(kernel_rank, size, kernel_rank, size)
    for t in range(kernel_rank):
        for u in range(kernel_rank):
            assert torch.allclose(gram[t, :, u], torch.diag(cover[t, u]), atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 30), data=st.data(), window=st.sampled_from(WINDOWS))
def test_slice_gather_is_the_adjoint_of_spread(size: int, data: st.DataObject, window: str) -> None:
    length = data.draw(st.integers(1, size))
    transform, one = Slice(size, size, window), torch.ones(1, 1)
    x, y = random(size, 3), random(length, 3)
    left = (transform.spread(x, length, one) * y).sum()
    assert torch.allclose(left, (x * transform.gather(y, size, one)[0]).sum())
    assert transform.coverage(length, size, one).sum() == length


def test_project_reads_both_memory_orders_alike() -> None:
    transform = Kronecker(8)
    y, basis = random(21, 5), random(8, 2)
    stored_the_other_way = y.T.contiguous().T
    assert torch.allclose(transform.project(y, basis), transform.project(stored_the_other_way, basis))
    padded = torch.cat([y, torch.zeros(3, 5, dtype=y.dtype)])
    assert torch.allclose(transform.project(y, basis)[1], basis.T @ padded[8:16])


@pytest.mark.parametrize(
    ("shapes", "size"),
    [
        ([(576, 576), (192, 576), (1536, 576)], 192),
        ([(4096, 4096), (1024, 4096), (14336, 4096)], 256),
        ([(768, 768), (2304, 768)], 256),
        ([(100, 100)], 100),
        ([(97, 89)], 89),  # no common divisor worth using: cut edges instead
        ([(1000, 1007)], 256),
    ],
)
def test_default_size_divides_where_it_can(shapes: list[tuple[int, int]], size: int) -> None:
    assert Kronecker.dividing(shapes).size == size


def test_kernel_variants_split_the_rank() -> None:
    assert split_rank("r_1", 8) == (8, 1)
    assert split_rank("1_r", 8) == (1, 8)
    assert split_rank("2_r", 8) == (2, 8)
    assert split_rank("2_r", 0) == (0, 0)


def test_a_kernels_rank_is_cut_to_its_grid() -> None:
    assert Kronecker(16).own_shapes((32, 64), 8) == {"A": (2, 4), "B": (2, 2)}


def test_slice_refuses_an_unknown_window() -> None:
    with pytest.raises(ValueError, match="window"):
        Slice(4, 4, "middle")
