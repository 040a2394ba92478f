"""Rounded LoRAs that know A's random initialisation: dense products in float64, bytes, and what they gain over the plain ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bslora_convert.baselines import QUANTISED, QUANTISED_INITIAL, WHOLE, WHOLE_INITIAL, Fitted, OutOfReach
from bslora_convert.baselines.coded import CodedFactors, Mix, larger
from bslora_convert.baselines.initialised import INITIAL, NOTHING, Known, Rows, best_of, lost
from bslora_convert.baselines.loraquant import STRONG, optimised, rounded
from bslora_convert.baselines.quantised import GRIDS, TRUNCATED_INITIAL, coded
from bslora_convert.baselines.ranks import by_energy, bytes_of, for_all
from bslora_convert.coding.items import KAPPA
from bslora_convert.comparison.forms import as_strong
from bslora_convert.fit.source import Source
from bslora_convert.initialisation.initial import Initial, tensor_key
from bslora_convert.initialisation.stream import Place
from bslora_convert.modules.factors import Factors, Shape
from tests.baselines.planted import dense, drawn, relative_error, source_of

SHAPES: dict[str, Shape] = {
    f"model.layers.{layer}.{kind}": shape
    for layer in range(2)
    for kind, shape in (("self_attn.q_proj", (192, 256)), ("mlp.down_proj", (128, 320)))
}
RANK, SEED = 8, 42


def planted(changed: float = 0.15, names: tuple[str, ...] = tuple(SHAPES)) -> Source:
    """Modules whose A's are draws, changed by normal noise of this relative size; the draws of `names` are known."""
    random, places, first = drawn(3), {}, 0
    for name, (_, width) in SHAPES.items():
        places[name] = Place(first, RANK)
        first += RANK * width
    initial = Initial.at(
        SEED, {tensor_key(n): place for n, place in places.items()}, {tensor_key(n): SHAPES[n][1] for n in places}
    )
    factors = {}
    for name, (out, width) in SHAPES.items():
        base = initial.base(name)
        assert base is not None
        noise = changed * base.square().mean().sqrt() * random(RANK, width)
        factors[name] = Factors(random(out, RANK) * 0.8 ** torch.arange(RANK), (base + noise) / width**0.5)
    return replace(source_of(factors), initial=initial.only(map(tensor_key, names)))


def size(source: Source, share: float) -> int:
    return int(share * source.parameters)


@pytest.mark.parametrize("form", QUANTISED_INITIAL)
@pytest.mark.parametrize("share", [0.125, 0.1])
def test_at_equal_bytes_clearly_less_is_lost(form: str, share: float) -> None:
    source = planted()
    budget = size(source, share)
    known = QUANTISED_INITIAL[form](source, budget, torch.bfloat16, 0)
    assert known.bytes is not None and known.bytes <= 2 * budget
    assert known.note == f"against A's initialisation, seed {SEED}"
    plain = QUANTISED[form.removesuffix(INITIAL)](source, budget, torch.bfloat16, 0)
    assert plain.note == ""
    assert relative_error(source, known) < 0.8 * relative_error(source, plain)


def test_loraquant_needs_no_signs_of_what_draws_give() -> None:
    source = planted()
    budget = size(source, 0.065)
    with pytest.raises(OutOfReach, match="bytes at least"):
        QUANTISED["loraquant_plain"](source, budget, torch.bfloat16, 0)
    known = QUANTISED_INITIAL["loraquant_plain_initial"](source, budget, torch.bfloat16, 0)
    assert known.bytes is not None and known.bytes <= 2 * budget
    assert relative_error(source, known) < 0.7


@pytest.mark.parametrize("form", WHOLE_INITIAL)
def test_the_whole_adapter_pays_for_t_and_loses_less(form: str) -> None:
    source = planted()
    known, plain = (
        forms[name](source, 0, torch.bfloat16, 0)
        for forms, name in ((WHOLE_INITIAL, form), (WHOLE, form.removesuffix(INITIAL)))
    )
    assert known.bytes is not None and plain.bytes is not None
    assert known.bytes == plain.bytes + 2 * RANK * RANK * len(SHAPES)
    assert known.parameters == plain.parameters + RANK * RANK * len(SHAPES)
    assert relative_error(source, known) < 0.85 * relative_error(source, plain)


def stored(codes: CodedFactors) -> Tensor:
    """The product of a module's codes in float64, row by row."""
    product = torch.zeros(1, dtype=torch.float64)
    at = 0
    for b, a in codes.parts:
        columns, rows = b.decode().double(), a.decode().double()
        for i, column in enumerate(columns):
            row = rows[i] if i < len(rows) else torch.zeros(1, dtype=torch.float64)
            if codes.mix is not None:
                row = row + codes.mix.numbers[at].double() @ codes.mix.base.double()
            product = product + torch.outer(column, row.expand(codes.factors().shape[1]))
            at += 1
    return codes.scaling * product


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("rest", [0, 3, RANK])
def test_codes_decode_to_b_times_t_a0_and_rest(name: str, rest: int) -> None:
    source, grid, module = planted(), GRIDS[name], next(iter(SHAPES))
    rows, factors = Rows(Known.of(source), {module: rest}), source.deltas[module].factors()
    codes = coded(grid, factors, 2.0, rows, module)
    assert torch.allclose(dense(codes.factors()), stored(codes), atol=1e-5)
    out, width = SHAPES[module]
    assert codes.bytes == grid.bytes(RANK, out) + grid.bytes(rest, width) + 2 * RANK * RANK
    assert codes.bytes == bytes_of(grid, source, {module: RANK}, rows)
    assert codes.numbers == RANK * (out + RANK) + rest * width


def test_at_fine_widths_the_product_is_the_update() -> None:
    source = planted(changed=0.3)
    fitted = TRUNCATED_INITIAL[f"svd_rtn_int8{INITIAL}"](source, 2 * source.parameters, torch.bfloat16, 0)
    for name, delta in source.deltas.items():
        target = dense(delta.factors())
        assert float((dense(fitted.deltas[name]) - target).norm()) < 0.01 * float(target.norm())


def test_an_unchanged_a_needs_no_codes() -> None:
    source = planted(changed=0.0)
    fitted = TRUNCATED_INITIAL[f"svd_rtn_int8{INITIAL}"](source, size(source, 0.23), torch.bfloat16, 0)
    assert fitted.settings["rank of A - T A0"] == 0
    assert fitted.settings["least rank"] == RANK
    assert relative_error(source, fitted) < 0.01


@pytest.mark.parametrize("plan", [for_all, by_energy])
def test_planned_ranks_fit_and_no_rank_of_the_rest_is_above_its_own(plan: type[for_all]) -> None:
    source, grid = planted(changed=0.5), GRIDS["nf4"]
    budget = 2 * size(source, 0.12)
    ranks, rows = plan(grid, source, Known.of(source), budget, "a form")
    assert 0.9 * budget < bytes_of(grid, source, ranks, rows) <= budget or plan is for_all
    assert all(0 <= rows.rest[name] <= rank for name, rank in ranks.items())
    with pytest.raises(OutOfReach, match="a form needs"):
        plan(grid, source, Known.of(source), 20, "a form")


@pytest.mark.parametrize("form", [*QUANTISED_INITIAL, *WHOLE_INITIAL])
def test_without_an_initialisation_there_is_no_fit(form: str) -> None:
    source = replace(planted(), initial=None)
    with pytest.raises(OutOfReach, match="needs A's random initialisation, which is not known"):
        {**QUANTISED_INITIAL, **WHOLE_INITIAL}[form](source, source.parameters, torch.bfloat16, 0)


@pytest.mark.parametrize("form", ["svd_nf4_adaptive_initial", "loraquant_plain_initial", "nf4_initial"])
def test_modules_whose_draws_are_not_known_are_stored_without(form: str) -> None:
    first, *others = SHAPES
    source = planted(names=(first,))
    assert list(Known.of(source).bases) == [first]
    fit = {**QUANTISED_INITIAL, **WHOLE_INITIAL}[form]
    fitted, everywhere = (fit(one, size(one, 0.25), torch.bfloat16, 0) for one in (source, planted()))
    assert relative_error(source, everywhere) < relative_error(source, fitted) < 0.7
    if form == "nf4_initial":
        plain = WHOLE["nf4"](source, 0, torch.bfloat16, 0)
        assert all(torch.equal(dense(fitted.deltas[name]), dense(plain.deltas[name])) for name in others)
        assert not torch.equal(dense(fitted.deltas[first]), dense(plain.deltas[first]))


@pytest.mark.parametrize("form", ["svd_nf4_initial", "svd_rtn_int4_adaptive_initial", "loraquant_plain_initial"])
def test_draws_that_are_no_help_are_not_paid_for(form: str) -> None:
    source = planted(changed=30.0)
    budget = size(source, 0.2)
    fitted = QUANTISED_INITIAL[form](source, budget, torch.bfloat16, 0)
    plain = QUANTISED[form.removesuffix(INITIAL)](source, budget, torch.bfloat16, 0)
    assert relative_error(source, fitted) <= 1.02 * relative_error(source, plain)
    if form != "svd_nf4_initial":  # one rank for all leaves bytes that T may have
        assert fitted.note == "" and fitted.bytes == plain.bytes


@pytest.mark.parametrize("form", ["svd_rtn_int8_adaptive_initial", "loraquant_initial", "rtn_int4_initial"])
def test_the_unbiased_twin_has_the_strength_of_the_original_in_as_many_bytes(form: str) -> None:
    source = planted(changed=0.3)
    fitted = {**QUANTISED_INITIAL, **WHOLE_INITIAL}[form](source, size(source, 0.25), torch.bfloat16, 0)
    strong = as_strong(source, fitted, torch.bfloat16)
    assert strong.bytes == fitted.bytes and strong.note == fitted.note
    for name, delta in source.deltas.items():
        target, made = dense(delta.factors()), dense(strong.deltas[name])
        assert float((target * made).sum() / target.square().sum()) == pytest.approx(1, abs=0.01)


def test_what_training_changed_is_made_as_large_as_it_is() -> None:
    source, module = planted(changed=0.5), next(iter(SHAPES))
    known = Known.of(source)
    factors = source.svds[module].truncate([source.deltas[module].factors()], RANK)
    mix = Mix.of(factors.a, known.bases[module])
    rest = factors.a - mix.decode()
    for grid in (STRONG[2], GRIDS["nf4"]):
        codes = grid.encode(rest)
        made = CodedFactors(((grid.encode(factors.b.T), codes),), mix=mix, larger=(larger(rest, codes),)).in_full()
        along = float((made.parts[0][1].decode() * rest).sum() / rest.square().sum())
        assert along == pytest.approx(1, abs=0.005)
    alone = CodedFactors(((codes, codes),))
    assert alone.in_full() is alone


def test_pairs_are_optimised_beside_what_is_held() -> None:
    random = drawn(5)
    b, held, rest = random(6, 300), random(6, 500), 0.4 * random(6, 500)
    a = held + rest

    def left(code: type[optimised], with_rest: bool) -> Tensor:
        first, second = code(b, a, STRONG[2], held, with_rest)
        assert len(second.codes) == (6 if with_rest else 0)
        made = held.double() + second.decode().double() if with_rest else held.double()
        products = torch.einsum("ki,kj->kij", b.double(), a.double())
        return (products - torch.einsum("ki,kj->kij", first.decode().double(), made)).square().sum((1, 2))

    for with_rest in (True, False):
        assert bool((left(optimised, with_rest) < left(rounded, with_rest)).all())


def test_what_is_left_out_of_the_changes_counts_more() -> None:
    source, grid = planted(changed=0.3), GRIDS["rtn_int8"]
    known = Known.of(source)
    fits: dict[int, Fitted] = {}
    for rest in (0, RANK):
        rows = Rows(known, dict.fromkeys(SHAPES, rest))
        parts = {name: coded(grid, source.deltas[name].factors(), 1.0, rows, name) for name in SHAPES}
        fits[rest] = Fitted({name: part.factors() for name, part in parts.items()}, 0, {})
        error = relative_error(source, fits[rest]) ** 2 * source.energy
        changed = sum(known.left_out(name, rest) for name in SHAPES)
        assert lost(source, fits[rest], rows, known) == pytest.approx(error + (KAPPA - 1) * changed)
    assert NOTHING.left_out("anything", 0) == 0
    for name in SHAPES:  # in dense matrices
        product, base = dense(source.deltas[name].factors()), known.bases[name].double()
        inside = product @ torch.linalg.pinv(base) @ base
        assert known.left_out(name, 0) == pytest.approx(float((product - inside).square().sum()), rel=1e-3)


def test_of_choices_that_fit_the_best_is_taken() -> None:
    def fit(choice: int) -> Fitted:
        if choice < 3:
            raise OutOfReach(f"{choice} does not fit")
        return Fitted({}, choice, {})

    assert best_of([1, 3, 5, 4], fit, lambda choice, fitted: abs(fitted.parameters - 4.2)) == 4
    with pytest.raises(OutOfReach, match="1 does not"):
        best_of([1, 2], fit, lambda choice, fitted: 0.0)
