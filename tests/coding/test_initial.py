"""Codes against A's random initialisation: what is gained, what is read back, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bslora_convert import Recipe, compress, expand, inspect, load_compact, load_lora
from bslora_convert.bslora.codes.file import WIDTHS_NAME
from bslora_convert.bslora.storage import load_coded
from bslora_convert.coding.encode import code_pair, code_rows, distortions, encode
from bslora_convert.coding.items import KAPPA, Against, component_items
from bslora_convert.coding.widths import options
from bslora_convert.conversion.initial import look_for
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.fit.source import measure
from bslora_convert.initialisation import kept
from bslora_convert.initialisation.initial import tensor_key
from bslora_convert.initialisation.stream import HALF
from bslora_convert.modules.factors import Factors
from tests.conftest import FIXTURES
from tests.initialisation.planted import draws
from tests.planting import drawn_lora

GSM8K = FIXTURES / "tiny" / "gsm8k"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny maths adapter with A's of seed 42, changed by a fifth."""
    return drawn_lora(GSM8K, tmp_path_factory.mktemp("drawn") / "lora")


@pytest.fixture(scope="module")
def compact(drawn: Path) -> Path:
    out = drawn.parent / "compact"
    compress(drawn, out, Recipe(transform="none", bytes=0.125), report_html=False)
    return out


def base_and_rows(changed: float, rank: int = 8, width: int = 700) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(rank, width, generator=generator) * 2 - 1
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
    rest = torch.randn(rank, width, generator=generator)
    rest -= rest @ torch.linalg.pinv(base) @ base
    return base, mix @ base + changed * rest * (base.norm() / rest.norm())


@pytest.mark.parametrize("transform", ["none", "ke", "gt", "ss"])
def test_the_same_bytes_lose_less_and_the_same_error_takes_fewer(drawn: Path, tmp_path: Path, transform: str) -> None:
    lost, taken = {}, {}
    for init in ("none", "auto"):
        sized = compress(
            drawn, tmp_path / f"b{init}", Recipe(transform=transform, bytes=0.125, init=init), report_html=False
        )
        lost[init] = sized.weight.relative_error**2
        assert sized.compact.bytes <= 0.125 * sized.source.bytes
        near = Recipe(transform=transform, max_error=0.2, max_rank="none", init=init)
        done = compress(drawn, tmp_path / f"e{init}", near, report_html=False)
        taken[init] = done.compact.bytes
        assert done.weight.relative_error <= 0.2
    assert lost["auto"] < (0.5 if transform == "none" else 0.8) * lost["none"]
    assert taken["auto"] < (0.8 if transform == "none" else 0.9) * taken["none"]


def test_the_record_says_what_was_found_and_saved(drawn: Path, compact: Path) -> None:
    record = json.loads((compact / "fidelity.json").read_text())
    found = record["initialisation"]
    assert (found["seed"], found["offset"], found["generator"]) == (42, 0, "mt19937")
    assert found["modules"] == found["used"] == record["source"]["modules"]
    assert found["cosine"] == pytest.approx(1 / np.sqrt(1 + 0.2**2), abs=2e-3)
    assert found["changed"] == pytest.approx(0.2**2 / (1 + 0.2**2), rel=0.05)
    assert found["bytes_without"] > 1.2 * record["compact"]["bytes"]
    assert record["compact"]["parameters"] < sum(t.numel() for t in load_compact(compact).form.tensors())
    assert "random initialisation was found (seed 42)" in (compact / "README.md").read_text()


def test_nothing_is_found_or_used_without_draws(tmp_path: Path) -> None:
    done = compress(GSM8K, tmp_path / "c", Recipe(transform="none", bytes=0.125), report_html=False)
    assert done.initialisation is None
    assert "initialisation" not in json.loads((tmp_path / "c" / "adapter_config.json").read_text())


def test_decoded_rows_are_the_dense_product(compact: Path) -> None:
    """B, T and R are read apart and put together in float64 with draws of NumPy's own generator."""
    read, coded = load_compact(compact), load_coded(compact)
    layout = read.layout
    assert layout.origin is not None and layout.origin.seed == 42
    parts = {}
    for key, shape in layout.stored():
        parts[key] = shape
    numbers = draws(42, layout.initial, layout.initial_lengths)
    from bslora_convert.bslora.codes.file import coded_tensors

    held = coded_tensors(coded.codes, layout.stored())  # type: ignore[union-attr]
    for key, base in numbers.items():
        name = key.removesuffix(".bslora_local_A")
        mix, rest = held[f"{key}_mix"], held[key]
        dense = mix.decode().double() @ torch.from_numpy(base.astype(np.float64) / HALF) + rest.decode().double()
        assert torch.equal(read.form.modules[name].local.a, dense.float().to(read.dtype)), name


def test_expanding_gives_the_form_back(compact: Path, tmp_path: Path) -> None:
    expand(compact, tmp_path / "lora")
    back, form = load_lora(tmp_path / "lora"), load_compact(compact).form
    for name, module in back.modules.items():
        wanted = form.delta(name)
        found = module.factors()
        assert torch.allclose(found.b @ found.a, wanted.b @ wanted.a, atol=1e-6)


def test_inspect_says_how_much_of_a_is_its_initialisation(drawn: Path) -> None:
    found = inspect(drawn)
    assert found.initialisation is not None and found.initialisation.seed == 42
    plain = inspect(GSM8K)
    assert plain.initialisation is None
    assert found.sizes is not None and plain.sizes is not None
    at = {row["value"]: row for row in found.sizes if row["option"] == "--max-error"}
    with_draws = compress(
        drawn, drawn.parent / "as-forecast", Recipe(transform="none", max_error=0.2), report_html=False
    )
    assert at[0.2]["bytes"] == pytest.approx(with_draws.compact.bytes, rel=0.1)


def test_a_seed_by_hand_is_taken_and_a_wrong_one_is_refused(drawn: Path, tmp_path: Path) -> None:
    taken = compress(drawn, tmp_path / "c", Recipe(transform="none", bytes=0.125, init=42), report_html=False)
    assert taken.initialisation is not None and taken.initialisation.seed == 42
    with pytest.raises(RecipeError, match="init is 43"):
        compress(drawn, tmp_path / "d", Recipe(transform="none", bytes=0.125, init=43), report_html=False)
    with pytest.raises(RecipeError, match="stored as floats"):
        Recipe(budget=0.25, init=42)
    with pytest.raises(RecipeError, match="init is 'somewhere': auto, none, search, a seed, or the directory"):
        compress(drawn, tmp_path / "e", Recipe(bytes=0.25, init="somewhere"), report_html=False)
    with pytest.raises(RecipeError, match="a seed or an adapter's directory is allowed"):
        Recipe(bytes=0.25, init=-1)


def test_one_width_holds_against_draws_too(drawn: Path, tmp_path: Path) -> None:
    errors = {}
    for init in ("none", "auto"):
        recipe = Recipe(transform="none", budget=0.5, bits=4, init=init)
        done = compress(drawn, tmp_path / init, recipe, report_html=False)
        errors[init] = done.weight.relative_error
    assert errors["auto"] <= errors["none"]


@pytest.mark.parametrize("changed", [0.05, 0.3, 1.0])
def test_what_rows_lose_is_what_their_widths_promise(changed: float) -> None:
    base, rows = base_and_rows(changed)
    share = changed**2 / (1 + changed**2)
    for mix, rest in ((8, 0), (8, 2), (5, 1), (8, 4)):
        coded = code_rows(rows, [(mix, rest)] * 8, base)
        lost = float((rows - coded.decode()).square().sum() / rows.square().sum())
        of_rest = 1.0 if rest == 0 else float(distortions(700)[rest - 1] / (1 - distortions(700)[rest - 1]))
        of_mix = (1 - share) * float(distortions(8)[mix - 1])
        promised = of_mix + share if rest == 0 else (share + of_mix) * of_rest
        assert lost == pytest.approx(promised, rel=0.25)


def test_what_training_changed_is_stored_as_large_as_it_is() -> None:
    base, rows = base_and_rows(0.4)
    onto = torch.linalg.pinv(base) @ base
    for rest in (1, 2, 3):
        coded = code_rows(rows, [(8, rest)] * 8, base).decode()
        own, found = rows - rows @ onto, coded - coded @ onto
        gain = float((own * found).sum() / own.square().sum())
        assert gain == pytest.approx(1.0, abs=0.01)
        shrunk = code_rows(rows, [(8, rest)] * 8, base, unbiased=False).decode()
        assert float((own * (shrunk - shrunk @ onto)).sum() / own.square().sum()) < 0.99


def test_a_row_without_a_mix_is_coded_as_ever() -> None:
    base, rows = base_and_rows(0.4)
    alone = encode(rows[:3], [2, 3, 4])
    both = code_rows(rows, [(0, 2), (0, 3), (0, 4), *[(8, 1)] * 5], base)
    assert torch.equal(both.decode()[:3], alone.decode())


def test_a_pair_against_draws_loses_what_dense_says() -> None:
    base, rows = base_and_rows(0.2)
    target = Factors(torch.randn(300, 8, generator=torch.Generator().manual_seed(1)), rows)
    svd = measure({"m": _product(target)}).svds["m"]
    start = svd.truncate([target], 8)
    for widths in ([((0, 3), (7, 1))] * 8, [((0, 4), (8, 0))] * 4 + [((0, 2), (0, 2))] * 4):
        for unbiased in (True, False):
            pair = code_pair(target, start, widths, (None, base), unbiased=unbiased)
            made = pair.factors()
            dense = (target.b.double() @ target.a.double() - made.b.double() @ made.a.double()).square().sum()
            assert pair.lost == pytest.approx(float(dense), rel=1e-5)


def test_rows_of_what_is_known_may_depend_on_each_other() -> None:
    """As columns of a B that training left at zero do."""
    base, rows = base_and_rows(0.2)
    base[3], base[5] = 0.0, base[4]
    against = Against.of(rows, base)
    onto = torch.linalg.pinv(base.double()) @ base.double()
    outside = 1 - (rows.double() @ onto).square().sum(1) / rows.double().square().sum(1)
    assert against.outside == pytest.approx(outside.numpy(), abs=1e-6)
    assert bool(code_rows(rows, [(8, 2)] * 8, base).decode().isfinite().all())


def test_options_are_those_of_the_formula() -> None:
    against = Against(16, np.array([0.0, 0.3]), np.array([0.0, 0.3]), KAPPA)
    items = component_items(np.array([2.0, 1.0]), (576, 1536), (None, against))
    assert items.energy is not None
    assert items.lost[:, 0] == pytest.approx([2.0, 1 + (KAPPA - 1) * 0.3])
    assert items.energy[:, 0] == pytest.approx([2.0, 1.0])
    place = 1 + options(known_a=True).index(((0, 2), (6, 0)))
    d_u, d_t = float(distortions(576)[1]), float(distortions(16)[5])
    expected = 1 - 0.7 * (1 - d_u) + (1 - d_u) * 0.7 * d_t
    assert items.energy[1, place] == pytest.approx(expected)
    assert items.lost[1, place] == pytest.approx(expected + (KAPPA - 1) * 0.3)
    plain = component_items(np.array([2.0, 1.0]), (576, 1536))
    assert items.energy[:, 1 : 1 + len(options())] == pytest.approx(plain.lost[:, 1:])


def test_an_initialisation_that_is_far_gone_is_not_used(tmp_path: Path) -> None:
    """A's that kept a tenth of their draws' energy: codes without them are smaller, and the file says nothing of them."""
    gone = drawn_lora(GSM8K, tmp_path / "lora", changed=3.0)
    done = compress(gone, tmp_path / "c", Recipe(transform="none", bytes=0.125), report_html=False)
    if done.initialisation is not None:
        assert done.initialisation.used is not None and done.initialisation.used < done.initialisation.modules


def _product(factors: Factors):  # type: ignore[no-untyped-def]
    from tests.planting import Product

    return Product(factors)


def changed_config(compact: Path, place: Path, change) -> Path:  # type: ignore[no-untyped-def]
    place.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (place / name).write_bytes((compact / name).read_bytes())
    config = json.loads((place / "adapter_config.json").read_text())
    change(config)
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def overlapping(config) -> None:  # type: ignore[no-untyped-def]
    place = first_of(config)["initial"]["A"]
    place[0] = " ".join(str(1 << 20 | number) for number in range(len(place[0].split())))


def first_of(config):  # type: ignore[no-untyped-def]
    return next(iter(config["modules"].values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["initialisation"].update(seed=43), "checksum"),
        (lambda c: c["initialisation"].update(checksum=1), "checksum"),
        (lambda c: c["initialisation"].update(seed=-1), "an object with seed or file"),
        (lambda c: c["initialisation"].update(seed=True), "an object with seed or file"),
        (lambda c: c["initialisation"].update(more=1), "an object with seed or file"),
        (lambda c: c.pop("initialisation"), "an object with seed or file"),
        (lambda c: [m.pop("initial") for m in c["modules"].values()], "no module has a place"),
        (lambda c: first_of(c).update(initial={"A": [1 << 60, 8]}), "draws so far on"),
        (lambda c: first_of(c).update(initial={"A": [0, 1 << 40]}), "a first draw and a rank"),
        (lambda c: first_of(c).update(initial={"A": [-1, 8]}), "a first draw and a rank"),
        (lambda c: first_of(c).update(initial={"A": [0, 0]}), "a first draw and a rank"),
        (lambda c: first_of(c).update(initial=[0, 8]), "an object of A and B"),
        (lambda c: first_of(c).update(initial={"A": [1, 8]}), "checksum"),
        (lambda c: first_of(c).update(initial={"A": [0, 4]}), "beyond its last vector"),
        (lambda c: first_of(c).update(kind="embedding"), "against nothing"),
        (overlapping, "places that overlap"),
    ],
)
def test_damage_is_refused_before_anything_is_drawn(compact: Path, tmp_path: Path, change, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=words):
        load_compact(changed_config(compact, tmp_path / "c", change))


def test_a_huge_shape_draws_nothing(compact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few bytes must not ask for gigabytes of draws or of zeros."""

    def refuse(*_: object) -> None:
        raise AssertionError("drawn")

    monkeypatch.setattr(kept, "Stream", refuse)

    def wide(config):  # type: ignore[no-untyped-def]
        first_of(config)["shape"][1] = (1 << 24) - 1

    with pytest.raises(InputError):
        load_compact(changed_config(compact, tmp_path / "c", wide))


def test_vectors_of_no_bits_stand_only_beside_draws(compact: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (tmp_path / name).write_bytes((compact / name).read_bytes())
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = f"base_model.model.{WIDTHS_NAME}"
    at = 0
    for tensor, (rows, columns) in load_compact(compact).layout.stored():
        if tensor.endswith("local_B"):  # columns of B are never left out
            tensors[key][at : at + columns] = 0
            break
        at += rows
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds 0 for"):
        load_compact(tmp_path)


def test_the_same_adapter_gives_the_same_bytes(drawn: Path, compact: Path, tmp_path: Path) -> None:
    compress(drawn, tmp_path / "again", Recipe(transform="none", bytes=0.125), report_html=False)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (compact / name).read_bytes()


def test_an_initialisation_is_of_the_modules_that_use_it(drawn: Path) -> None:
    adapter = load_lora(drawn)
    known = look_for(adapter, "auto")
    assert known is not None and known.offset == 0
    initial = known.initial
    some = list(adapter.modules)[:3]
    part = initial.only(map(tensor_key, some))
    assert part is not None and part.modules == some and initial.only([]) is None
    assert part.origin != initial.origin
    source = replace(measure(adapter.modules), initial=part)
    assert source.initial is part and part.base("nothing") is None
