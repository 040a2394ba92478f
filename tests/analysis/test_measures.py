"""Each measure against a dense computation in float64, and against chance."""

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bslora_convert.analysis import entropy, ranks, subspaces
from bslora_convert.analysis.clusters import clusters, layer_signatures, partitions, signatures, similarities
from bslora_convert.analysis.sharing import explained, random_like, shared_energy
from bslora_convert.bslora.transforms import Kronecker
from bslora_convert.fit.convert import measure
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.process.progress import silent
from tests.planting import KINDS, Product, deltas_of, plant, random_products


def dense(product: Product) -> Tensor:
    return product.held.b.double() @ product.held.a.double()


def dense_rmi(first: Tensor, second: Tensor) -> float:
    def entropy_of(numbers: Tensor) -> float:
        return 0.5 * math.log(2 * math.pi * math.e * float(numbers.var(unbiased=False)))

    one, two = entropy_of(first), entropy_of(second)
    joint = entropy_of(torch.cat([first.flatten(), second.flatten()]))
    return math.copysign(1.0, joint) * (one + two - joint) / max(abs(one), abs(two))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 5), st.floats(1e-4, 100.0), st.integers(0, 99))
def test_rmi_is_that_of_the_dense_updates(out: int, width: int, rank: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def product(rows: int, columns: int, by: float) -> Product:
        b = by * torch.randn(rows, rank, generator=generator, dtype=torch.float64) + by
        return Product(Factors(b, torch.randn(rank, columns, generator=generator, dtype=torch.float64)))

    deltas = {"first": product(out, width, 1.0), "second": product(width, out + 3, scale)}
    source = measure(deltas)
    pools = [entropy.pool(delta, source.grams[name]) for name, delta in deltas.items()]
    wanted = dense_rmi(dense(deltas["first"]), dense(deltas["second"]))
    assert entropy.relative_mutual_information(*pools) == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    assert entropy.rmi_matrix(pools)[0][0] == pytest.approx(1.0)


def test_rmi_is_one_for_unrelated_updates_of_like_variance() -> None:
    source = measure(random_products(layers=2))
    pools = [entropy.pool(source.deltas[name], source.grams[name]) for name in source.deltas if name.endswith("q_proj")]
    assert entropy.relative_mutual_information(*pools) > 0.97
    nothing = Product(Factors(torch.zeros(4, 1), torch.ones(1, 4)))
    assert (
        entropy.relative_mutual_information(pools[0], entropy.pool(nothing, measure({"x": nothing}).grams["x"])) == 0.0
    )


def test_pairs_are_those_of_dense_decompositions() -> None:
    products = [product for name, product in random_products(layers=4).items() if name.endswith("mlp.up_proj")]
    spaces = [subspaces.Spaces.of(product.held) for product in products]
    for side, dimension in (("columns", 0), ("rows", 1)):
        found = subspaces.pairs(spaces, side)
        for i, first in enumerate(map(dense, products)):
            for j, second in enumerate(map(dense, products)):
                one, two = (matrix if dimension == 0 else matrix.T for matrix in (first, second))
                u, v = (torch.linalg.svd(m, full_matrices=False)[0][:, :8] for m in (one, two))
                angles = torch.linalg.svdvals(u.T @ v)
                assert float(found.overlap[i, j]) == pytest.approx(float(angles.square().mean()), rel=1e-5)
                torch.testing.assert_close(
                    subspaces.cosines(spaces[i].side(side), spaces[j].side(side)), angles.clamp(0, 1), rtol=0, atol=1e-6
                )
                wanted = (two.T @ one).square().sum() / ((one.T @ one).norm() * (two.T @ two).norm())
                assert float(found.cka[i, j]) == pytest.approx(float(wanted), rel=1e-5)


def test_random_subspaces_have_a_z_around_zero_and_unit_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    spaces = [
        subspaces.Spaces.of(Factors(torch.randn(40, 5, generator=generator), torch.randn(5, 30, generator=generator)))
        for _ in range(40)
    ]
    z = subspaces.pairs(spaces, "columns").z
    off = z[~torch.eye(40, dtype=torch.bool)]
    assert abs(float(off.mean())) < 0.15
    assert 0.85 < float(off.std()) < 1.15


def test_a_module_without_an_update_is_no_obstacle() -> None:
    zero = subspaces.Spaces.of(Factors(torch.zeros(6, 2), torch.ones(2, 5)))
    other = subspaces.Spaces.of(Factors(torch.eye(6)[:, :2], torch.ones(2, 5)))
    assert subspaces.Spaces.of(Factors(torch.ones(6, 2), torch.zeros(2, 5))).singular.numel() == 0
    assert entropy.NOTHING.variance == 0.0
    found = subspaces.pairs([zero, other], "columns")
    assert all(torch.isfinite(matrix).all() for matrix in (found.overlap, found.z, found.cka))
    assert float(found.cka[0, 1]) == 0.0


def test_parallel_starts_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 30, generator=generator)
    stored = {
        "first": start + 0.05 * torch.randn(4, 30, generator=generator), "second": 3 * start,
        "other": torch.randn(4, 30, generator=generator), "shorter": torch.randn(4, 20, generator=generator),
        "nothing": torch.zeros(4, 30),
    }  # fmt: skip
    found = subspaces.shared_initialisation(stored)
    assert [pair["modules"] for pair in found] == [["first", "second"]]
    assert found[0]["cosine"] == pytest.approx(subspaces.cosine(stored["first"], stored["second"]))
    assert subspaces.cosine(stored["nothing"], start) == 0.0


def test_ranks_of_a_known_spectrum() -> None:
    row = ranks.of_module(torch.tensor([8.0, 1.0, 1.0, 0.0]), 4)
    assert row["stable_rank"] == pytest.approx(10 / 8)
    assert row["effective_rank"] == pytest.approx(math.exp(-(0.8 * math.log(0.8) + 0.2 * math.log(0.1))))
    assert row["rank_for"] == {"0.9": 2, "0.95": 3, "0.99": 3}
    assert ranks.of_module(torch.zeros(3), 3)["effective_rank"] == 0.0


# ------------------------------------------------------------------------------------------ sharing and its null


def test_a_drawn_adapter_has_the_spectra_and_none_of_the_directions() -> None:
    source = measure(random_products(layers=3))
    drawn = random_like(source, torch.Generator().manual_seed(1))
    for name, values in source.spectra.items():
        torch.testing.assert_close(drawn.spectra[name], values, rtol=1e-4, atol=1e-6)
    assert drawn.groups == source.groups


def test_z_is_small_for_independent_adapters_and_large_for_planted_ones() -> None:
    independent = shared_energy(measure(random_products(layers=4, seed=3)), 6, 0, silent)
    for transform, levels in independent.items():
        for level, row in levels.items():
            assert abs(row["z"]) < 4, (transform, level, row)
    planted = shared_energy(measure(deltas_of(plant(Kronecker(32), (2, 4, 8), layers=4))), 4, 0, silent)
    assert planted["ke"]["inter"]["z"] > 5
    assert planted["ke"]["intra"]["z"] > 5
    assert planted["gt"]["inter"]["z"] == 0.0


def test_a_form_of_one_level_is_explained_by_it() -> None:
    source = measure(deltas_of(plant(Kronecker(32), (0, 0, 8), layers=3)))
    assert explained(source, "ke", "inter") > 1 - 1e-4


# -------------------------------------------------------------------------------------------------- clusters


def two_families(
    layers: int = 5, ranks: tuple[int, int, int] = (1, 0, 6), kinds: Mapping[str, Shape] = KINDS
) -> dict[str, Product]:
    """Even layers share one pair, odd layers another."""
    families = [plant(Kronecker(32), ranks, layers=layers, seed=seed, kinds=kinds) for seed in (1, 2)]
    return {
        f"model.layers.{2 * layer + family}.{kind}": Product(form.delta(f"model.layers.{layer}.{kind}"))
        for layer in range(layers)
        for family, form in enumerate(families)
        for kind in kinds
    }


def test_planted_groups_of_layers_are_found() -> None:
    source = measure(two_families())
    layers = layer_signatures(source, signatures(source, Kronecker(32)))
    found = clusters(list(layers), similarities(list(layers.values())))
    assert {frozenset(int(name.rpartition(".")[2]) % 2 for name in members) for members in found.members} == {
        frozenset({0}), frozenset({1})
    }  # fmt: skip
    assert found.silhouette > 0.8
    suggested = partitions(source)["clusters of layers"]
    assert sorted(map(len, suggested.values())) == [35, 35]


def test_signatures_are_those_of_the_dense_blocks() -> None:
    source = measure(random_products(layers=1))
    own = signatures(source, Kronecker(32))
    for name, delta in source.deltas.items():
        whole = delta.factors().b.double() @ delta.factors().a.double()
        columns = sum(block.T @ block for block in whole.split(32, dim=1))
        rows = sum(block @ block.T for block in whole.split(32, dim=0))
        torch.testing.assert_close(own[name], torch.stack([columns, rows]), rtol=1e-4, atol=1e-3)


def test_unrelated_layers_are_one_cluster() -> None:
    source = measure(random_products(layers=8))
    assert partitions(source) == {}
    assert partitions(measure(dict(list(random_products().items())[:2]))) == {}
