"""The authors' layout: read as their formulas say, written back bit by bit, and nothing doubtful gets through."""

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.form import Path as SharedPath
from bslora_convert.bslora.official import is_official, load_official, save_official
from bslora_convert.bslora.storage import load_compact
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice
from bslora_convert.errors import BsloraConvertError, InputError, RecipeError, Refused, ThresholdMissed
from bslora_convert.lora import load_lora
from bslora_convert.modules.factors import Factors
from bslora_convert.recipe.recipe import Recipe
from bslora_convert.verbs.compress import compress
from bslora_convert.verbs.expand import expand
from bslora_convert.verbs.inspect import inspect
from tests.official import (
    CONFIG,
    FIELDS,
    KINDS,
    PREFIX,
    SIZES,
    WEIGHTS,
    dense,
    official,
    official_tensors,
    write_official,
)
from tests.planting import plant, random_products, write_lora

RANKS = [(2, 4, 8), (0, 3, 2), (2, 0, 3), (2, 3, 0), (0, 3, 0)]
UP0, UP1 = (f"{PREFIX}model.layers.{layer}.mlp.up_proj.sharelora_" for layer in (0, 1))
FIRST = f"{PREFIX}model.layers.0.mlp.down_proj.sharelora_"  # in natural order; it owns the shared pairs


def same(first: Tensor, second: Tensor) -> bool:
    return (
        first.dtype == second.dtype
        and first.shape == second.shape
        and torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))
    )


def is_idle(key: str, ranks: tuple[int, int, int]) -> bool:
    """Whether a tensor is a kernel or gate of a path of rank 0, which the form does not hold."""
    own = "sampler." in key or "gate." in key
    return own and any(
        f".{level}_" in key and not rank for level, rank in zip(("intra", "inter"), ranks[1:], strict=True)
    )


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("mode", SIZES)
def test_deltas_are_those_of_the_authors_formulas(tmp_path: Path, mode: str, ranks: tuple[int, int, int]) -> None:
    tensors = official_tensors(mode, ranks)
    adapter = load_official(write_official(tmp_path / "in", tensors, mode, ranks))
    assert len(adapter.form.modules) == 2 * len(KINDS)
    for name, module in adapter.form.modules.items():
        expected = dense(tensors, mode, name, module.shape)
        delta = adapter.form.delta(name)
        assert delta.rank == adapter.form.expanded_rank(name)
        error = (delta.b.double() @ delta.a.double() - expected).norm() / expected.norm()
        assert error < 1e-5  # the form computes in float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("mode", SIZES)
def test_there_and_back_is_bit_exact(
    tmp_path: Path, mode: str, ranks: tuple[int, int, int], dtype: torch.dtype
) -> None:
    source = official(tmp_path / "in", mode, ranks, dtype)
    (tmp_path / "out").mkdir()
    adapter = load_official(source)
    save_official(adapter.form, tmp_path / "out", adapter.inherited)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert set(before) == set(after)
    for key, tensor in before.items():
        if is_idle(key, ranks):
            assert not after[key].any()
        else:
            assert same(tensor, after[key]), key
    first = json.loads((source / CONFIG).read_text())
    second = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert list(second) == FIELDS
    unused = {"slice": {"gate_share_size", "kron_share_size"}, "gate": {"kron_share_size"}, "kron": {"gate_share_size"}}
    assert {field for field in FIELDS if first[field] != second[field]} <= {"lora_dropout"} | unused[mode]
    assert second["lora_dropout"] == 0.0
    assert second["lora_alpha"] is None


PLANTED: dict[str, Callable[[], BsloraForm]] = {
    "slice": lambda: plant(Slice(64, 64), layers=2, kinds=KINDS),
    "gate": lambda: plant(Gate(8), layers=2, kinds=KINDS),
    "kron": lambda: plant(Kronecker(8), layers=2, kinds=KINDS),
}


@pytest.mark.parametrize("mode", PLANTED)
def test_a_form_comes_back_bit_exact(tmp_path: Path, mode: str) -> None:
    form = PLANTED[mode]()
    save_official(form, tmp_path, {})
    back = load_official(tmp_path).form
    assert back.transform == form.transform
    assert set(back.modules) == set(form.modules)
    for name, module in form.modules.items():
        assert back.modules[name].shape == module.shape
        assert same(back.modules[name].local.b, module.local.b)
        assert same(back.modules[name].local.a, module.local.a)
        for level, path in module.paths.items():
            assert back.modules[name].paths[level].group == path.group
            for own, tensor in path.own.items():
                assert same(back.modules[name].paths[level].own[own], tensor)
    for level, groups in form.shared.items():
        for group, pair in groups.items():
            assert same(back.pair(level, group).b, pair.b)
            assert same(back.pair(level, group).a, pair.a)


def test_smaller_local_ranks_are_filled_up_with_zeros(tmp_path: Path) -> None:
    form = PLANTED["kron"]()
    name = "model.layers.1.mlp.up_proj"
    module = form.modules[name]
    short = replace(module, local=Factors(module.local.b[:, :1], module.local.a[:1]))
    form = replace(form, modules={**form.modules, name: short})
    save_official(form, tmp_path, {})
    stored = load_file(tmp_path / WEIGHTS)
    assert not stored[f"{UP1}lora_B.local.weight"][:, 1:].any()
    assert json.loads((tmp_path / CONFIG).read_text())["r_local"] == 2
    back = load_official(tmp_path).form
    for other in form.modules:
        first, second = form.delta(other), back.delta(other)
        assert torch.allclose(first.b @ first.a, second.b @ second.a, rtol=1e-5, atol=1e-4)


def test_targets_are_endings_where_these_say_enough(tmp_path: Path) -> None:
    form = PLANTED["kron"]()
    save_official(form, tmp_path, {})
    endings = ["down_proj", "k_proj", "q_proj", "up_proj", "v_proj"]
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == endings
    some = {name: module for name, module in form.modules.items() if name != "model.layers.1.mlp.up_proj"}
    save_official(replace(form, modules=some), tmp_path, {})
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == sorted(some)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_any_shapes_and_ranks_survive(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    directory = tmp_path_factory.mktemp("any")
    mode = data.draw(st.sampled_from(sorted(SIZES)))
    ranks = tuple(data.draw(st.integers(0, 3)) for _ in range(3))
    if not any(ranks):
        ranks = (0, 0, 1)
    s = data.draw(st.integers(1, 5))
    step = s if mode == "kron" else 1
    kinds = {
        f"block.{kind}": (step * data.draw(st.integers(1, 5)), step * data.draw(st.integers(1, 5))) for kind in "abc"
    }
    largest = max(out for out, _ in kinds.values()), max(width for _, width in kinds.values())
    tensors = official_tensors(mode, ranks, kinds=kinds, size=largest if mode == "slice" else (s, s))
    source = write_official(directory / "in", tensors, mode, ranks, kron_share_size=s, gate_share_size=s)
    adapter = load_official(source)
    for name, module in adapter.form.modules.items():
        delta = adapter.form.delta(name)
        expected = dense(tensors, mode, name, module.shape)
        assert torch.allclose(delta.b.double() @ delta.a.double(), expected, rtol=1e-4, atol=1e-4)
    (directory / "out").mkdir()
    save_official(adapter.form, directory / "out", adapter.inherited)
    after = load_file(directory / "out" / WEIGHTS)
    assert all(same(tensor, after[key]) for key, tensor in tensors.items() if not is_idle(key, ranks))


# What is refused on the way in.


def broken(tmp_path: Path, mode: str, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    tensors = official_tensors(mode)
    change(tensors)
    return write_official(tmp_path / "in", tensors, mode, **config)


def put(key: str, tensor: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.__setitem__(key, tensor(tensors[key]))


def drop(word: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [tensors.pop(key) for key in list(tensors) if word in key]


def add(key: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.__setitem__(key, torch.ones(2, 2))


def rename(before: str, after: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [
        tensors.__setitem__(key.replace(before, after), tensors.pop(key)) for key in list(tensors) if before in key
    ]


def second_adapter(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key.replace("sharelora_lora_A.", "sharelora_lora_A.other.")] = tensors[key].clone()


def nan(tensor: Tensor) -> Tensor:
    return tensor.index_fill(0, torch.tensor([0]), float("nan"))


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], type[BsloraConvertError], tuple[str, ...]]] = {
    "copies of intra differ": (
        "kron",
        put(f"{UP0}lora_A.intra.weight", lambda t: t + 1),
        InputError,
        (f"{FIRST}lora_A.intra.weight", f"{UP0}lora_A.intra.weight", "differ"),
    ),
    "copies of inter differ": (
        "slice",
        put(f"{UP1}lora_B.inter.weight", lambda t: t * 2),
        InputError,
        (f"{FIRST}lora_B.inter.weight", f"{UP1}lora_B.inter.weight", "differ"),
    ),
    "no samplers": ("kron", drop("sampler"), InputError, ("intra_sampler_A.weight is missing", "'kron'")),
    "no gates": ("gate", drop("sharelora_gate"), InputError, ("intra_input_gate_down.weight is missing", "'gate'")),
    "one gate": ("gate", drop(f"{UP1}gate.inter_output_gate_up"), InputError, (UP1, "is missing")),
    "no local part": ("slice", drop(f"{UP1}lora_B.local"), InputError, (f"{UP1}lora_B.local.weight is missing",)),
    "gates of another mode": (
        "slice",
        add(f"{UP0}gate.intra_input_gate_up.weight"),
        InputError,
        ("contradicts share_mode 'slice'",),
    ),
    "unknown key": ("kron", add(f"{PREFIX}lm_head.weight"), Refused, ("lm_head.weight", "no such tensor")),
    "baseline of theirs": (
        "kron",
        add(f"{PREFIX}model.layers.0.mlp.up_proj.baseline_sharelora_A.weight"),
        Refused,
        ("baseline_sharelora_A", "no such tensor"),
    ),
    "unknown name": ("kron", add(f"{UP0}lora_A.outer.weight"), InputError, ("lora_A.outer", "no such tensor")),
    "two adapters": ("kron", second_adapter, Refused, (".other.", "several adapters in one file")),
    "other names": (
        "kron",
        rename("model.layers.0.mlp.up_proj", "model.decoder.layers.0.mlp.up_proj"),
        Refused,
        ("model.decoder.layers.0.mlp.up_proj is not of the form",),
    ),
    "layer without a number": (
        "kron",
        rename("layers.0.", "layers.zero."),
        Refused,
        ("model.layers.zero.", "is not of the form"),
    ),
    "wrong shape": (
        "gate",
        put(f"{UP0}gate.intra_input_gate_up.weight", lambda t: t[:-1].contiguous()),
        InputError,
        (f"{UP0}gate.intra_input_gate_up.weight", "(23, 1)", "(24, 1) is expected"),
    ),
    "no matrix": (
        "kron",
        put(f"{UP0}lora_A.local.weight", lambda t: t.flatten()),
        InputError,
        ("a matrix is expected",),
    ),
    "does not divide": (
        "kron",
        put(f"{UP1}lora_B.local.weight", lambda t: torch.ones(60, 2)),
        InputError,
        (UP1, "the shared size 16 does not divide both sides of a module of 60×32"),
    ),
    "larger than what it is cut from": (
        "slice",
        put(f"{UP1}lora_B.local.weight", lambda t: torch.ones(65, 2)),
        InputError,
        (UP1, "larger than the shared 64×64"),
    ),
    "not finite": ("kron", put(f"{UP0}lora_B.local.weight", nan), InputError, (f"{UP0}lora_B.local.weight", "NaN")),
    "integers": (
        "kron",
        put(f"{UP0}lora_B.local.weight", lambda t: t.to(torch.int32)),
        InputError,
        ("a float type is expected",),
    ),
    "several dtypes": (
        "kron",
        put(f"{UP0}lora_B.local.weight", lambda t: t.half()),
        InputError,
        ("torch.float16", "one dtype is expected"),
    ),
    "an endless empty side": (
        "slice",
        put(f"{UP0}lora_A.local.weight", lambda t: torch.empty(0, 1 << 40)),
        InputError,
        ("no model is as large",),
    ),
    "another local rank": (
        "kron",
        put(f"{UP1}lora_A.local.weight", lambda t: torch.ones(3, 32)),
        InputError,
        (f"{UP1}lora_A.local.weight", "(2, 32) is expected"),
    ),
    "shared factors that are not square": (
        "gate",
        put(f"{FIRST}lora_A.inter.weight", lambda t: torch.ones(8, 23)),
        InputError,
        ("one size above 0 is expected",),
    ),
    "nothing": ("kron", lambda tensors: tensors.clear(), InputError, ("holds no tensors",)),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(tmp_path: Path, case: str) -> None:
    mode, change, error, words = DAMAGE[case]
    directory = broken(tmp_path, mode, change)
    with pytest.raises(error) as caught:
        load_official(directory)
    message = str(caught.value)
    assert str(directory / WEIGHTS) in message
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"share_mode": "kronecker"}, Refused, "share_mode is 'kronecker'"),
        ({"share_mode": None}, Refused, "share_mode is None"),
        ({"share_mode": ["kron"]}, Refused, "share_mode is"),
        ({"share_mode": "gate"}, InputError, "contradicts share_mode 'gate'"),
        ({"r_local": 3}, InputError, "r_local is 3 but the tensors have 2"),
        ({"r_inter": "8"}, InputError, "r_inter is '8' but the tensors have 8"),
        ({"kron_share_size": 256}, InputError, "kron_share_size is 256 but the tensors have 16"),
        ({"layer_replication": [[0, 2]]}, Refused, "layer_replication"),
        ({"use_dora": True}, Refused, "DoRA"),
        ({"something_new": 1}, Refused, "something_new is 1: a setting that this version does not know"),
        ({"peft_type": "LORA"}, InputError, "peft_type is 'LORA'"),
    ],
)
def test_configurations_that_say_something_else(
    tmp_path: Path, config: dict[str, Any], error: type[BsloraConvertError], words: str
) -> None:
    tensors = official_tensors("kron")
    with pytest.raises(error, match=r"adapter_config\.json|adapter_model") as caught:
        load_official(write_official(tmp_path / "in", tensors, "kron", **config))
    assert words in str(caught.value)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", [None, True, -1, 1e308, "x", [], [1], {"a": []}])
def test_nothing_in_a_configuration_breaks_the_reader(tmp_path: Path, field: str, value: Any) -> None:
    directory = official(tmp_path / "in", "kron")
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, field: value}))
    with contextlib.suppress(BsloraConvertError):
        assert load_official(directory).form.expanded_rank("model.layers.0.mlp.up_proj") == 14


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
def test_cut_files_are_damage(tmp_path: Path, share: float) -> None:
    weights = official(tmp_path / "in", "kron") / WEIGHTS
    content = weights.read_bytes()
    weights.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=WEIGHTS):
        load_official(weights)


def test_a_refused_adapter_is_still_described(tmp_path: Path) -> None:
    seen = inspect(broken(tmp_path, "kron", lambda tensors: None, share_mode="krom"))
    assert (seen["kind"], seen["convertible"], seen["modules"]) == ("official-bslora", False, 2 * len(KINDS))
    assert "krom" in seen["reasons"][0]


def test_all_ranks_zero_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="changes nothing"):
        load_official(official(tmp_path / "in", "kron", (0, 0, 0)))


def test_numbers_that_can_not_be_doubled(tmp_path: Path) -> None:
    tensors = {key: tensor.half() for key, tensor in official_tensors("kron").items()}
    tensors[f"{UP1}lora_B.local.weight"][3, 1] = 40000.0
    with pytest.raises(Refused, match=r"layers\.1\.mlp\.up_proj.*overflow torch\.float16.*float32"):
        load_official(write_official(tmp_path / "in", tensors, "kron"))


def test_signs_of_zeros_are_bits_too(tmp_path: Path) -> None:
    tensors = official_tensors("kron")
    for key in [key for key in tensors if key.endswith("lora_A.inter.weight")]:
        tensors[key][0, 0] = 0.0
    assert load_official(write_official(tmp_path / "in", tensors, "kron"))
    tensors[f"{UP1}lora_A.inter.weight"][0, 0] = -0.0
    with pytest.raises(InputError, match="differ"):
        load_official(write_official(tmp_path / "in", tensors, "kron"))


def test_one_named_adapter_and_a_missing_rank_in_the_configuration_are_read(tmp_path: Path) -> None:
    tensors = official_tensors("kron")
    for box in ("lora_A", "lora_B", "sampler"):
        rename(f"sharelora_{box}.", f"sharelora_{box}.default.")(tensors)
    adapter = load_official(write_official(tmp_path / "in", tensors, "kron", r_intra=None, lora_alpha=16))
    assert adapter.form.shared_rank("intra") == 4
    assert "lora_alpha is 16" in adapter.notes[0]


def test_idle_kernels_may_be_missing(tmp_path: Path) -> None:
    tensors = official_tensors("kron", (2, 0, 3))
    drop("intra_sampler")(tensors)
    assert load_official(write_official(tmp_path / "in", tensors, "kron", (2, 0, 3))).form.shared_rank("intra") == 0


def test_pickled_weights_are_read_as_plain_tensors(tmp_path: Path) -> None:
    source = official(tmp_path / "in", "gate")
    torch.save(load_file(source / WEIGHTS), source / "adapter_model.bin")
    (source / WEIGHTS).unlink()
    assert load_official(source).form.shared_rank("inter") == 8


def test_what_is_not_official(tmp_path: Path) -> None:
    assert is_official(official(tmp_path / "in", "kron"))
    assert not is_official(write_lora(tmp_path / "lora", random_products(layers=1)))
    assert not is_official(tmp_path / "nowhere")


# What is refused on the way out.


def renamed(form: BsloraForm, before: str, after: str) -> BsloraForm:
    return replace(form, modules={name.replace(before, after): module for name, module in form.modules.items()})


def without_a_path() -> BsloraForm:
    form = PLANTED["kron"]()
    name = "model.layers.1.mlp.up_proj"
    lonely = replace(form.modules[name], paths={})
    return replace(form, modules={**form.modules, name: lonely})


def two_in_a_layer() -> BsloraForm:
    form = PLANTED["slice"]()
    name = "model.layers.1.mlp.up_proj"
    module = form.modules[name]
    strange = replace(module, paths={**module.paths, "intra": SharedPath("model.layers.0")})
    return replace(form, modules={**form.modules, name: strange})


UNWRITABLE: dict[str, tuple[Callable[[], BsloraForm], str]] = {
    "nothing shared": (
        lambda: replace(plant(Gate(8), (2, 0, 0), layers=1, kinds=KINDS), transform=None),
        "transform none.*expand it to a LoRA",
    ),
    "another window": (lambda: plant(Slice(64, 64, "top-left"), layers=1, kinds=KINDS), "slice top-left.*centre only"),
    "kernels of rank 2": (
        lambda: plant(Kronecker(8), layers=1, kinds=KINDS, kernel_ranks=(1, 2)),
        "inter kernels of rank 2",
    ),
    "cut edges": (lambda: plant(Kronecker(24), layers=1, kinds=KINDS), "shared size 24 does not divide"),
    "other names": (
        lambda: renamed(PLANTED["kron"](), "model.layers", "transformer.h.layers"),
        "module transformer.h.layers.0.*model.layers.N.block.module",
    ),
    "a module that does not share": (without_a_path, "model.layers.1.mlp.up_proj has no intra part"),
    "two pairs in a layer": (two_in_a_layer, "two intra pairs in layer model.layers.1"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_their_layout_can_not_hold(tmp_path: Path, case: str) -> None:
    make, words = UNWRITABLE[case]
    with pytest.raises(Refused, match=words):
        save_official(make(), tmp_path, {})
    assert not list(tmp_path.iterdir())


# The verbs.


def deltas(path: Path) -> dict[str, Tensor]:
    factors = {name: module.factors() for name, module in load_lora(path).modules.items()}
    return {name: pair.b.double() @ pair.a.double() for name, pair in factors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", SIZES)
def test_all_verbs_end_to_end(tmp_path: Path, mode: str, dtype: torch.dtype) -> None:
    source = official(tmp_path / "in", mode, dtype=dtype)
    (source / "tokenizer.json").write_text("{}")
    tensors = load_file(source / WEIGHTS)
    seen = inspect(source)
    assert (seen["kind"], seen["convertible"], seen["reasons"]) == ("official-bslora", True, [])
    assert seen["stored_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert sum(seen["bytes_by_part"].values()) == dtype.itemsize * seen["stored_parameters"]
    assert seen["bytes_by_part"]["copies"] > 0

    record = compress(source, tmp_path / "compact")
    assert record["weight"]["relative_error"] < 1e-6
    assert record["source"]["parameters"] == seen["stored_parameters"]
    assert record["compact"]["parameters"] == seen["parameters"]
    assert record["compact"]["parameter_ratio"] == seen["parameters"] / seen["stored_parameters"]
    assert record["compact"]["dtype"] == record["source"]["dtype"] == seen["dtype"]
    assert record["compact"]["transform"] == record["recipe"]["transform"]
    assert record["recipe"]["ranks"] == [2, 4, 8]
    assert (tmp_path / "compact" / "tokenizer.json").exists()
    for name in ("fidelity.json", "report.html", "README.md"):
        assert (tmp_path / "compact" / name).stat().st_size
    assert "Nothing was fitted" in (tmp_path / "compact" / "README.md").read_text()
    form, found = load_compact(tmp_path / "compact").form, load_official(source).form
    assert all(same(a, b) for a, b in zip(form.tensors(), found.tensors(), strict=True))

    for origin, out in ((source, "direct"), (tmp_path / "compact", "by-way")):
        assert expand(origin, tmp_path / out, dtype="float32")["relative_error"] < 1e-6
        for name, delta in deltas(tmp_path / out).items():
            expected = dense(tensors, mode, name, delta.shape)
            assert (delta - expected).norm() / expected.norm() < 1e-5
    config = json.loads((tmp_path / "direct" / CONFIG).read_text())
    assert config["base_model_name_or_path"] == "a-llama"
    assert config["peft_type"] == "LORA"

    written = expand(tmp_path / "compact", tmp_path / "again", format="official")
    assert written["ranks"] == {"local": 2, "intra": 4, "inter": 8}
    assert written["parameters"] == seen["stored_parameters"]
    again = load_official(tmp_path / "again").form
    assert all(same(a, b) for a, b in zip(form.tensors(), again.tensors(), strict=True))
    assert written["relative_error"] < 1e-6  # products of the same numbers, which lie elsewhere in memory
    after = load_file(tmp_path / "again" / WEIGHTS)
    assert set(after) == set(tensors)
    assert all(same(tensor, after[key]) for key, tensor in tensors.items())


@pytest.mark.parametrize(
    ("mode", "stored", "unique"), [("slice", 41472, 8192), ("gate", 12864, 7872), ("kron", 7104, 3776)]
)
def test_how_much_their_files_repeat(tmp_path: Path, mode: str, stored: int, unique: int) -> None:
    """A toy Llama of two layers, width 64 and feed-forward 160: what the authors' code writes against what it trains."""
    attention = {"self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64)}
    kinds = {**attention, "mlp.up_proj": (160, 64), "mlp.down_proj": (64, 160)}
    size = {"slice": (160, 160), "gate": (24, 24), "kron": (16, 16)}[mode]
    tensors = official_tensors(mode, kinds=kinds, size=size)
    source = write_official(tmp_path / "in", tensors, mode, gate_share_size=size[0], kron_share_size=size[0])
    seen = inspect(source)
    assert (seen["stored_parameters"], seen["parameters"]) == (stored, unique)
    assert seen["bytes_by_part"]["copies"] == 4 * (stored - unique)
    compress(source, tmp_path / "out", report_html=False)
    assert (tmp_path / "out" / WEIGHTS).stat().st_size < (source / WEIGHTS).stat().st_size


def test_options_of_a_fit_are_left_out_and_said(tmp_path: Path) -> None:
    source = official(tmp_path / "in", "gate")
    record = compress(
        source, tmp_path / "out", Recipe(transform="ss", ranks=(1, 1, 1), dtype="float16"), report_html=False
    )
    assert record["notes"][-1].endswith("without effect: --transform, --ranks")
    assert record["compact"]["transform"] == "gt"
    assert record["compact"]["dtype"] == "float16"
    assert 1e-5 < record["weight"]["relative_error"] < 1e-2
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1 + 1 =", "completion": " 2"}\n')
    for name in ("prompts", "finetune"):
        recipe = Recipe(base_model="a-llama", **{name: str(prompts)})
        with pytest.raises(RecipeError, match="without a fit"):
            compress(source, tmp_path / "other", recipe, report_html=False)
    with pytest.raises(ThresholdMissed, match="float32"):
        compress(source, tmp_path / "other", Recipe(max_error=1e-6, dtype="bfloat16"), report_html=False)
    assert not (tmp_path / "other").exists()


def test_idle_kernels_are_left_behind(tmp_path: Path) -> None:
    source = official(tmp_path / "in", "kron", (2, 0, 3))
    parts = inspect(source)["bytes_by_part"]
    assert parts["without_effect"] == 4 * 2 * sum(out // 16 + width // 16 for out, width in KINDS.values())
    record = compress(source, tmp_path / "out", report_html=False)
    assert record["compact"]["ranks"] == {"local": 2, "intra": 0, "inter": 3}


def test_fitted_adapters_are_written_in_the_authors_layout(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "lora", random_products(rank=8))
    compress(lora, tmp_path / "compact", Recipe(transform="ke", budget=0.6, shared_size=32), report_html=False)
    written = expand(tmp_path / "compact", tmp_path / "official", format="official")
    assert written["relative_error"] < 1e-6
    form, back = load_compact(tmp_path / "compact").form, load_official(tmp_path / "official").form
    for name in form.modules:
        first, second = form.delta(name), back.delta(name)
        assert torch.allclose(first.b @ first.a, second.b @ second.a, rtol=1e-4, atol=1e-5)
    with pytest.raises(RecipeError, match="only a LoRA"):
        expand(tmp_path / "compact", tmp_path / "other", format="official", rank=4)
    with pytest.raises(RecipeError, match="one of lora, gguf, mlx, official"):
        expand(tmp_path / "compact", tmp_path / "other", format="onnx")


def test_carried_tensors_have_no_place_in_the_authors_layout(tmp_path: Path) -> None:
    extra = {f"{PREFIX}score.weight": torch.ones(2, 64)}
    lora = write_lora(tmp_path / "lora", random_products(rank=4), extra=extra)
    compress(lora, tmp_path / "compact", Recipe(ranks=(1, 1, 1), shared_size=32), report_html=False)
    with pytest.raises(Refused, match=r"carries score\.weight"):
        expand(tmp_path / "compact", tmp_path / "out", format="official")
    assert not (tmp_path / "out").exists()
