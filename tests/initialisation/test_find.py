import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bslora_convert.initialisation.beginning import Firsts
from bslora_convert.initialisation.drawn import Module, normal
from bslora_convert.initialisation.found import Found, find
from bslora_convert.initialisation.match import Heads, matches
from bslora_convert.initialisation.order import Order
from bslora_convert.initialisation.stream import Place
from bslora_convert.initialisation.tape import Tape
from bslora_convert.modules.factors import Shape
from tests.initialisation.planted import assert_draws, drawn, llama, trained, unseeded

SMALL = llama(3)


def assert_found(modules: dict[str, Module], original: dict[str, Module], seed: int, offset: int = 0) -> Found:
    found = find(modules)
    assert found is not None
    assert (found.seed, found.offset) == (seed, offset)
    assert list(found.places) == list(original)
    assert_draws(found, original)
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 15, 16, 17, 31, 32, 1000])
def test_outputs_that_normal_numbers_take(count: int) -> None:
    torch.manual_seed(6)
    torch.randn(count)
    after = torch.rand(50)
    torch.manual_seed(6)
    assert torch.equal(torch.rand(normal(count) + 50)[normal(count) :], after)


@pytest.mark.parametrize("offset", [0, 2, 13_908, 2**22])
def test_offsets(offset: int) -> None:
    original = drawn(SMALL, 42, offset)
    assert_found(trained(original), original, 42, offset)


@pytest.mark.parametrize("seed", [0, 3407, 777, 67280421310721])
def test_usual_seeds(seed: int) -> None:
    original = drawn(SMALL, seed)
    assert_found(trained(original), original, seed)


def test_a_given_seed_is_the_only_one() -> None:
    original = drawn(SMALL, 2**32 + 98_765, 70_000)
    found = find(trained(original), seed=2**32 + 98_765)
    assert found is not None
    assert (found.seed, found.offset, len(found.places)) == (2**32 + 98_765, 70_000, len(original))


@pytest.mark.slow
def test_a_thorough_search_looks_at_more_seeds() -> None:
    original = drawn(SMALL, 7391)
    said: list[tuple[int, int]] = []
    found = find(original, thorough=True, progress=lambda phase, done=0, total=0, words="": said.append((done, total)))
    assert found is not None
    assert found.seed == 7391
    assert [done for done, _ in said] == list(range(len(said)))
    assert {total for _, total in said} == {said[0][1]}


def test_another_order_of_the_file_changes_nothing() -> None:
    original = drawn(SMALL, 42, 2)
    names = list(original)
    random.Random(1).shuffle(names)
    whole = trained(original)
    found = find({name: whole[name] for name in names})
    assert found == find(whole)


@pytest.mark.parametrize("beginning", [0, 1, 4])
def test_modules_that_are_missing_are_passed(beginning: int) -> None:
    original = drawn(llama(6), 42)
    kept = {name: module for number, (name, module) in enumerate(original.items()) if number % 5 != beginning}
    found = find(trained(kept))
    assert found is not None
    assert list(found.places) == list(kept)
    assert_draws(found, kept)


@pytest.mark.parametrize("replaced", [0, 9, 20])
def test_a_module_drawn_elsewhere_is_left_out(replaced: int) -> None:
    original = drawn(SMALL, 42)
    name = list(original)[replaced]
    found = find(unseeded(trained(original), [name]))
    assert found is not None
    assert list(found.places) == [other for other in original if other != name]
    assert_draws(found, original)


def test_what_is_half_trained_away_is_found_at_the_start() -> None:
    original = drawn(SMALL, 42, rank=16)
    found = assert_found(trained(original, noise=3**0.5), original, 42)
    assert 0.45 < found.cosine < 0.55


@pytest.mark.parametrize(("times", "bias"), [(2, True), (2, False), (1, True)])
def test_older_versions_of_peft(times: int, bias: bool) -> None:
    def older(shape: Shape) -> None:
        for _ in range(times):
            nn.Linear(shape[1], shape[0], bias=bias)

    original = drawn(SMALL, 42, older=older)
    assert_found(trained(original), original, 42)


def test_small_modules_are_found_beside_others() -> None:
    wide = {
        name: (2048, 2048) for name in SMALL if name.endswith("q_proj")
    }  # these begin, the others are 64 to 128 numbers
    original = drawn({**SMALL, **wide}, 42, rank=1)
    found = find(trained(original))
    assert found is not None
    assert list(found.places) == list(original)
    assert_draws(found, original)


def test_places_do_not_overlap() -> None:
    original = drawn(llama(4), 42)
    found = find(unseeded(trained(original), list(original)[::3]))
    assert found is not None
    ends = [place.first + original[name].size for name, place in found.places.items()]
    assert all(end <= place.first for end, place in zip(ends, list(found.places.values())[1:], strict=False))


@pytest.mark.parametrize("fewer", [1, 3])
def test_an_earlier_find_is_used(fewer: int) -> None:
    original = drawn(SMALL, 123_456_789, 5_000)
    places = find(trained(original), seed=123_456_789)
    assert places is not None
    sibling = trained(dict(list(original.items())[::fewer]), noise=0.3)
    again = find(sibling, before=[Found(1, {"other": Place(0, 1)}, {"other": 1.0}, 0), places])
    assert again is not None
    assert (again.seed, again.offset) == (places.seed, places.offset)
    assert again.places == {name: places.places[name] for name in sibling}


def test_an_earlier_find_gives_a_seed_for_other_modules() -> None:
    attention = {name: shape for name, shape in SMALL.items() if "attn" in name}
    earlier = find(trained(drawn(attention, 123_456_789, 12_345)), seed=123_456_789)
    assert earlier is not None
    original = drawn(SMALL, 123_456_789, 12_345)
    found = find(trained(original), before=[earlier])
    assert found is not None
    assert set(found.places) == set(SMALL)


def test_nothing_is_found_where_nothing_was_drawn() -> None:
    original = drawn(SMALL, 42)
    assert find(unseeded(original)) is None
    generator = torch.Generator().manual_seed(9)
    assert (
        find({name: Module(torch.randn(m.a.shape, generator=generator), m.out) for name, m in original.items()}) is None
    )
    assert find({}) is None


def test_odd_numbers_are_no_match() -> None:
    for value in (0.0, 1.0, float("nan"), float("inf")):
        assert find({name: Module(torch.full((8, 64), value), 64) for name in SMALL}) is None
    holed = trained(drawn(SMALL, 42))
    holed["model.layers.0.self_attn.k_proj"].a[1, 3] = float("nan")
    found = find(holed)
    assert found is not None
    assert set(SMALL) - set(found.places) == {"model.layers.0.self_attn.k_proj"}


def chance(adapters: int, size: int) -> int:
    """Matches of random A's anywhere in the first draws of 42."""
    tape, generator, matched = Tape(42), np.random.default_rng(3), 0
    for number in range(adapters):
        numbers = generator.uniform(-1, 1, (1, size)) if number % 2 else generator.standard_t(3, (1, size))
        modules = {"layers.0.q": Module(torch.from_numpy(numbers), 1)}
        heads = Heads(modules)
        firsts = Firsts(Order(modules), heads, ())
        matched += sum(matches("layers.0.q", first, heads, tape) is not None for first in range(0, 2000, 100))
        matched += len(list(firsts.at_the_start((42,), range(17))))
    return matched


@pytest.mark.parametrize("size", [200, 600])
def test_chance_is_no_match(size: int) -> None:
    assert chance(300, size) == 0


@pytest.mark.slow
def test_chance_is_no_match_in_ten_thousand() -> None:
    assert chance(10_000, 256) == 0
    shapes = {"layers.0.q": (64, 64), "layers.0.v": (64, 64)}
    assert [seed for seed in range(10) if find(unseeded(drawn(shapes, 42, rank=4), seed=seed))] == []


def test_a_real_adapter(real_adapter: Path) -> None:
    tensors = load_file(real_adapter / "adapter_model.safetensors")
    modules = {
        key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): Module(
            a, len(tensors[key.replace("_A", "_B")])
        )
        for key, a in tensors.items()
        if "lora_A" in key
    }
    found = find(modules)
    assert found is not None
    assert (found.seed, found.offset, len(found.places)) == (0, 0, 210)
    assert found.cosine == pytest.approx(0.978, abs=1e-3)
    assert find(modules, before=[found]) == found
