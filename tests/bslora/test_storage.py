"""Forms on disk: bit-exact and small, the same bytes every time, and nothing hostile gets through."""

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bslora_convert.bslora.form import BsloraForm, Module
from bslora_convert.bslora.form import Path as SharedPath
from bslora_convert.bslora.storage import load_compact, save_compact
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice
from bslora_convert.errors import BsloraConvertError, InputError
from bslora_convert.modules.factors import Factors
from tests.planting import plant

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
KINDS = {"q": (8, 12), "v": (4, 12)}
FORMS: dict[str, Callable[[], BsloraForm]] = {
    "ke": lambda: plant(Kronecker(4), (2, 1, 3), layers=2, kinds=KINDS),
    "ke-kernels": lambda: plant(Kronecker(4), (2, 1, 2), layers=2, kinds=KINDS, kernel_ranks=(1, 2)),
    "ke-cut-edges": lambda: plant(Kronecker(5), (0, 1, 3), layers=2, kinds=KINDS),
    "ss": lambda: plant(Slice(8, 12), (2, 1, 3), layers=2, kinds=KINDS),
    "ss-top-left": lambda: plant(Slice(8, 12, "top-left"), (2, 1, 3), layers=2, kinds=KINDS),
    "ss-intra-only": lambda: plant(Slice(9, 15, "bottom-right"), (1, 2, 0), layers=2, kinds=KINDS),
    "ss-inter-only": lambda: plant(Slice(8, 12, "bottom-right"), (2, 0, 3), layers=2, kinds=KINDS),
    "gt": lambda: plant(Gate(6), (2, 3, 3), layers=2, kinds=KINDS),
    "none": lambda: replace(plant(Gate(6), (2, 0, 0), layers=2, kinds=KINDS), transform=None),
}


def saved(form: BsloraForm, directory: Path, **carried: torch.Tensor) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_compact(form, directory, {"base_model_name_or_path": "a-base", "task_type": "CAUSAL_LM"}, carried)
    return directory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMS)
def test_round_trips_are_bit_exact(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]().to(dtype)
    passenger = torch.arange(6.0)
    read = load_compact(saved(form, tmp_path / "out", **{"score.weight": passenger}))
    assert read.form.transform == form.transform
    assert read.dtype == dtype
    assert list(read.form.modules) == list(form.modules)
    for first, second in zip(form.tensors(), read.form.tensors(), strict=True):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    for module, other in zip(form.modules.values(), read.form.modules.values(), strict=True):
        assert {level: path.group for level, path in module.paths.items()} == {
            level: path.group for level, path in other.paths.items()
        }
    assert torch.equal(read.carried["score.weight"], passenger)


@pytest.mark.parametrize("name", FORMS)
def test_each_shared_tensor_is_stored_once(tmp_path: Path, name: str) -> None:
    form = FORMS[name]()
    stored = load_file(saved(form, tmp_path / "out", **{"score.weight": torch.ones(3, 5)}) / WEIGHTS)
    assert len(stored) == sum(1 for _ in form.tensors()) + 1
    assert sum(tensor.numel() for tensor in stored.values()) == form.parameters + 15
    for level, groups in form.shared.items():
        for pair in groups.values():
            assert sum(torch.equal(pair.b, tensor) for tensor in stored.values()) == 1
        assert sum(key.endswith(f".bslora_{level}_B") for key in stored) == len(groups)


def test_views_transposes_and_aliases_keep_their_numbers(tmp_path: Path) -> None:
    table = torch.randn(40, 40, generator=torch.Generator().manual_seed(3))
    local = Factors(table[:8, 5:7], table.T[10:12, :12])
    pair = Factors(table[4:8, :2], table[:4, :2].T)
    own = {"A": table[:1, 1:4], "B": table[20:22, :1]}
    paths = {"intra": SharedPath("model.layers.0", own), "inter": SharedPath("all", own)}
    modules = {f"model.layers.0.{name}": Module((8, 12), local, paths) for name in ("q", "v")}
    form = BsloraForm(Kronecker(4), modules, {"intra": {"model.layers.0": pair}, "inter": {"all": pair}})
    read = load_compact(saved(form, tmp_path / "out", head=table[1:3], tail=table[1:3])).form
    for first, second in zip(form.tensors(), read.tensors(), strict=True):
        assert torch.equal(first, second)
    stored = load_file(tmp_path / "out" / WEIGHTS)
    for name in ("head", "tail"):
        assert torch.equal(stored[f"base_model.model.{name}"], table[1:3])
    # Views are written as what they show, not as the table behind them.
    assert (tmp_path / "out" / WEIGHTS).stat().st_size < table.numel() * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_what_is_carried_keeps_its_own_type(tmp_path: Path, dtype: torch.dtype) -> None:
    passenger = torch.arange(-4, 8).reshape(3, 4).to(dtype)
    directory = saved(FORMS["ke"]().to(torch.float16), tmp_path / "out", **{"score.weight": passenger})
    (name,) = (read := load_compact(directory)).carried
    assert name == "score.weight"
    assert read.carried[name].dtype == dtype
    assert torch.equal(read.carried[name], passenger)
    assert read.dtype == torch.float16


def test_a_carried_number_that_is_infinite_is_not_ours_to_judge(tmp_path: Path) -> None:
    passenger = torch.tensor([1.0, float("-inf"), float("inf")])
    read = load_compact(saved(FORMS["ke"](), tmp_path / "out", **{"score.weight": passenger}))
    assert read.carried["score.weight"].view(torch.int32).equal(passenger.view(torch.int32))


def test_the_format_is_what_it_was(tmp_path: Path) -> None:
    """A golden file: changing any of this needs a new format_version."""
    form = plant(Kronecker(4), (1, 1, 2), layers=1, kinds=KINDS).to(torch.bfloat16)
    directory = saved(form, tmp_path / "out")
    with safe_open(directory / WEIGHTS, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "data_sha256": "08f96fe8bd5de2bdcdf4bf8ba9c932d3b5461075982eda3f5efc089025644465",
        }
        header = {
            key: (file.get_slice(key).get_dtype(), file.get_slice(key).get_shape()) for key in sorted(file.keys())
        }
    prefix = "base_model.model.model.layers.0."
    assert {key.removeprefix(prefix): value for key, value in header.items()} == {
        "q.bslora_local_A": ("BF16", [1, 12]),
        "q.bslora_local_B": ("BF16", [8, 1]),
        "q.bslora_intra_A": ("BF16", [1, 4]),
        "q.bslora_intra_B": ("BF16", [4, 1]),
        "q.bslora_inter_A": ("BF16", [2, 4]),
        "q.bslora_inter_B": ("BF16", [4, 2]),
        "q.bslora_intra_own_A": ("BF16", [1, 3]),
        "q.bslora_intra_own_B": ("BF16", [2, 1]),
        "q.bslora_inter_own_A": ("BF16", [1, 3]),
        "q.bslora_inter_own_B": ("BF16", [2, 1]),
        "v.bslora_local_A": ("BF16", [1, 12]),
        "v.bslora_local_B": ("BF16", [4, 1]),
        "v.bslora_intra_own_A": ("BF16", [1, 3]),
        "v.bslora_intra_own_B": ("BF16", [1, 1]),
        "v.bslora_inter_own_A": ("BF16", [1, 3]),
        "v.bslora_inter_own_B": ("BF16", [1, 1]),
    }
    assert json.loads((directory / CONFIG).read_text()) == {
        "peft_type": "BSLORA",
        "format_version": 5,
        "inference_mode": True,
        "base_model_name_or_path": "a-base",
        "task_type": "CAUSAL_LM",
        "target_modules": r"(?:.*\.)?(?:layers\.0\.(?:q|v))",
        "dtype": "bfloat16",
        "transform": {"name": "ke", "size": 4},
        "shared": {
            "intra": {"model.layers.0": {"rank": 1, "kernel_rank": 1}},
            "inter": {"all": {"rank": 2, "kernel_rank": 1}},
        },
        "modules": {
            "model.layers.0.q": {"shape": [8, 12], "rank": 1, "intra": "model.layers.0", "inter": "all"},
            "model.layers.0.v": {"shape": [4, 12], "rank": 1, "intra": "model.layers.0", "inter": "all"},
        },
    }


def test_target_modules_say_exactly_what_is_adapted(tmp_path: Path) -> None:
    form = FORMS["none"]()
    kept: tuple[dict[str, Any], ...] = (
        {"target_modules": ["q", "v"]},
        {"target_modules": ["q", "v"], "layers_to_transform": [0, 1]},
        {"target_modules": r".*\.layers\.[01]\.[qv]"},
        {"target_modules": ["q", "v"], "exclude_modules": ["other.q"]},
    )
    for source in kept:
        save_compact(form, tmp_path, source, {})
        config = json.loads((tmp_path / CONFIG).read_text())
        assert {field: config[field] for field in source} == source
    for source in (
        {"target_modules": "all-linear"},
        {"target_modules": ["q"]},
        {"target_modules": ["q", "v"], "layers_to_transform": [0]},
    ):
        save_compact(form, tmp_path, source, {})
        config = json.loads((tmp_path / CONFIG).read_text())
        assert "layers_to_transform" not in config
        assert all(re.fullmatch(config["target_modules"], name) for name in form.modules)
        assert not re.fullmatch(config["target_modules"], "model.layers.7.q")


def test_the_same_form_is_the_same_bytes(tmp_path: Path) -> None:
    first, second = (saved(FORMS["ke"](), tmp_path / name) for name in ("a", "b"))
    for name in (WEIGHTS, CONFIG):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def rankless(out: int, width: int) -> Factors:
    return Factors(torch.zeros(out, 0), torch.zeros(0, width))


def test_modules_without_a_local_part_and_embeddings(tmp_path: Path) -> None:
    form = FORMS["ke"]()
    modules = dict(form.modules)
    name = "model.layers.0.q"
    modules[name] = replace(modules[name], local=rankless(8, 12))
    modules["model.embed_tokens"] = Module((8, 50), rankless(8, 50), {}, "embedding")
    read = load_compact(saved(replace(form, modules=modules), tmp_path / "out")).form
    assert read.modules[name].local.rank == 0
    assert read.modules["model.embed_tokens"].kind == "embedding"
    assert read.parameters == replace(form, modules=modules).parameters


def test_the_weights_are_readable_by_whom_the_directory_is(tmp_path: Path) -> None:
    directory = saved(FORMS["ke"](), tmp_path / "out")
    assert (directory / WEIGHTS).stat().st_mode & 0o777 == (directory / CONFIG).stat().st_mode & 0o777


def refused(directory: Path, *words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_compact(directory)
    for word in words:
        assert word in str(caught.value)


Q = "base_model.model.model.layers.0.q.bslora_"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({Q + "local_A": None}, ("local_A is missing",)),
        ({Q + "inter_B": None}, ("inter_B is missing",)),
        ({Q + "intra_own_A": None}, ("intra_own_A is missing",)),
        ({Q + "local_C": torch.zeros(1)}, ("local_C", "belongs to no module")),
        ({Q.replace("layers.0", "layers.9") + "local_A": torch.zeros(1)}, ("layers.9", "belongs to no module")),
        ({Q + "local_A": torch.zeros(2, 13)}, ("local_A", "(2, 12) is expected")),
        ({Q + "local_B": torch.zeros(8, 3)}, ("local_B", "(8, 2) is expected")),
        ({Q + "inter_A": torch.zeros(3, 5)}, ("inter_A", "(3, 4) is expected")),
        ({Q + "inter_A": torch.zeros(12)}, ("inter_A", "(3, 4) is expected")),
        ({Q + "intra_own_A": torch.zeros(1, 4)}, ("intra_own_A", "(1, 3)")),
        ({Q + "intra_own_A": torch.zeros(3)}, ("intra_own_A",)),
        ({Q + "intra_own_B": torch.zeros(2, 2)}, ("intra_own_B", "(2, 1)")),
        ({Q + "local_A": torch.full((2, 12), float("nan"))}, ("local_A", "NaN")),
        ({Q + "inter_B": torch.full((4, 3), float("inf"))}, ("inter_B", "infinite")),
        ({Q + "intra_own_B": torch.full((2, 1), float("-inf"))}, ("intra_own_B", "infinite")),
        ({Q + "inter_own_C": torch.zeros(1, 1)}, ("inter_own_C", "belongs to no module")),
        ({Q.replace("0.q", "0.v") + "inter_A": torch.zeros(3, 4)}, ("0.v.bslora_inter_A", "belongs to no module")),
        ({Q + "inter_own_A": torch.zeros(3, 3), Q + "inter_own_B": torch.zeros(2, 3)}, ("inter_own_A", "(1, 3)")),
        ({Q + "local_A": torch.zeros(2, 12, dtype=torch.int32)}, ("local_A", "int32")),
        ({Q + "local_A": torch.zeros(2, 12, dtype=torch.float16)}, ("several dtypes",)),
        ({"model.layers.0.q.x": torch.zeros(1)}, ("every key starts with",)),
    ],
)
def test_hostile_tensors(tmp_path: Path, changes: dict[str, torch.Tensor | None], words: tuple[str, ...]) -> None:
    directory = saved(FORMS["ke"](), tmp_path / "out")
    tensors: dict[str, Any] = {**load_file(directory / WEIGHTS), **changes}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, directory / WEIGHTS)
    refused(directory, WEIGHTS, *words)


def module(**changes: Any) -> dict[str, Any]:
    entry = {"shape": [8, 12], "rank": 2, "intra": "model.layers.0", "inter": "all", **changes}
    return {"modules": {"model.layers.0.q": {key: value for key, value in entry.items() if value is not None}}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LORA"}, "peft_type"),
        ({"format_version": 6}, "format_version is 6, this version reads 5"),
        ({"format_version": 1}, "format_version is 1, this version reads 5; convert the LoRA again"),
        ({"coding": {"version": 1, "group": 1024}}, "coding is"),
        ({"format_version": None}, "format_version"),
        ({"transform": None}, "transform is None"),
        ({"transform": {"name": "xx"}}, "transform is"),
        ({"transform": {"name": "ke"}}, "transform"),
        ({"transform": {"name": "ke", "size": 0}}, "transform.size is 0"),
        ({"transform": {"name": "ke", "size": "4"}}, "transform.size"),
        ({"transform": {"name": "ke", "size": 1 << 40}}, "transform.size"),
        ({"transform": {"name": "ke", "size": 4, "more": 1}}, "transform"),
        ({"transform": {"name": "ss", "size_out": 8, "size_in": 12, "window": "middle"}}, "window"),
        (
            {"transform": {"name": "ss", "size_out": 4, "size_in": 12, "window": "center"}},
            "larger than the shared factors",
        ),
        ({"transform": {"name": "none"}}, "although the transform is none"),
        ({"modules": {}}, "modules is empty"),
        ({"modules": [1]}, "modules"),
        (module(shape=[8, -12]), "shape"),
        (module(shape=[8, True]), "shape"),
        (module(shape=[8]), "shape"),
        (module(shape="8x12"), "shape"),
        (module(shape=[8, 1 << 50]), "shape"),
        (module(kind="conv"), "kind is 'conv'"),
        (module(intra=3), "the name of a group in shared.intra"),
        (module(inter="none of them"), "the name of a group in shared.inter"),
        (module(rank=-1), "rank is -1"),
        (module(rank=None), "rank is None"),
        (module(rank=1 << 40), "rank is"),
        (module(intra=None, inter=None), "has no module"),
        ({"shared": []}, "shared is not an object"),
        ({"shared": {"outer": {}}}, "shared.outer"),
        ({"shared": {"inter": {"all": 3}}}, "shared.inter[all]"),
        ({"shared": {"inter": {"all": {"kernel_rank": 1}}}}, "has no rank"),
        ({"shared": {"inter": {"all": {"rank": 0}}}}, "shared.inter[all].rank is 0"),
        ({"shared": {"inter": {"all": {"rank": 3, "more": 1}}}}, "shared.inter[all]"),
        ({"modules": {"model.layers.0.q": 7}}, "an object with a shape"),
    ],
)
def test_hostile_configurations(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    directory = saved(FORMS["ke"](), tmp_path / "out")
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **changes}))
    refused(directory, CONFIG, words)


def test_missing_files(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no such directory")
    directory = saved(FORMS["ke"](), tmp_path / "out")
    (directory / WEIGHTS).unlink()
    refused(directory, WEIGHTS, "no such file")


def small(place: str) -> Path:
    return saved(plant(Kronecker(2), (1, 1, 1), layers=1, kinds={"q": (4, 2)}), Path(place) / "out")


def assert_usable_or_refused(directory: Path) -> None:
    try:
        form = load_compact(directory).form
    except BsloraConvertError as error:
        assert str(directory) in str(error)
        return
    for name, module in form.modules.items():
        assert form.delta(name).shape == module.shape
        assert form.delta(name).rank == form.expanded_rank(name)
    assert form.parameters > 0


@settings(max_examples=150, deadline=None)
@given(data=st.data(), file=st.sampled_from([WEIGHTS, CONFIG]))
def test_damaged_bytes_raise_nothing_else(data: st.DataObject, file: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        directory = small(place)
        content = bytearray((directory / file).read_bytes())
        for _ in range(data.draw(st.integers(1, 6))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content)))]
        (directory / file).write_bytes(content)
        assert_usable_or_refused(directory)


WORDS = st.sampled_from(
    ["name", "size", "size_out", "size_in", "window", "shape", "rank", "kernel_rank", "kind", "intra", "inter", "local",
     "none", "ke", "gt", "ss", "all", "center", "linear", "embedding", "model.layers.0.q", "model.layers.0", "", "\x00"]
)  # fmt: skip
NUMBERS = st.integers(-1, 8) | st.sampled_from([1 << 31, 1 << 64, 10**400]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
PLACES: list[tuple[str, ...]] = [
    ("peft_type",),
    ("format_version",),
    ("transform",),
    *(("transform", field) for field in ("name", "size", "window", "size_out")),
    ("modules",),
    ("modules", "model.layers.0.q"),
    ("modules", "model.layers.0.v"),
    *(("modules", "model.layers.0.q", field) for field in ("shape", "rank", "kind", "intra", "inter", "local")),
    ("shared",),
    ("shared", "inter"),
    ("shared", "inter", "all"),
    *(("shared", "inter", "all", field) for field in ("rank", "kernel_rank")),
]


@settings(max_examples=300, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(PLACES), VALUES, min_size=1, max_size=3))
def test_wrong_values_of_any_field_raise_nothing_else(changes: dict[tuple[str, ...], Any]) -> None:
    with tempfile.TemporaryDirectory() as place:
        directory = small(place)
        config = json.loads((directory / CONFIG).read_text())
        for (*parents, field), value in changes.items():
            at = config
            for parent in parents:
                at = at.get(parent, {}) if isinstance(at, dict) else {}
            if isinstance(at, dict):
                at[field] = value
        (directory / CONFIG).write_text(json.dumps(config))
        assert_usable_or_refused(directory)


@settings(max_examples=40, deadline=None)
@given(
    out=st.integers(1, 9), width=st.integers(1, 9), size=st.integers(1, 10),
    ranks=st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(0, 2)), name=st.sampled_from(["ke", "ss", "gt"]),
)  # fmt: skip
def test_round_trips_of_any_shape(out: int, width: int, size: int, ranks: tuple[int, int, int], name: str) -> None:
    transform = {"ke": Kronecker(size), "ss": Slice(max(out, size), max(width, size)), "gt": Gate(size)}[name]
    form = plant(
        transform,
        ranks,
        layers=2,
        kinds={"a": (out, width), "b": (width, out)} if name != "ss" else {"a": (out, width)},
    )
    with tempfile.TemporaryDirectory() as place:
        read = load_compact(saved(form, Path(place) / "out")).form
    for first, second in zip(form.tensors(), read.tensors(), strict=True):
        assert torch.equal(first, second)
    for module_name in form.modules:
        assert read.expanded_rank(module_name) == form.delta(module_name).rank


def test_the_owner_of_a_pair_is_found_whatever_the_order_of_modules(tmp_path: Path) -> None:
    """PEFT sorts the keys of configurations that it saves again."""
    form = FORMS["ke"]()
    directory = saved(form, tmp_path / "out")
    config = json.loads((directory / CONFIG).read_text())
    config["modules"] = dict(reversed(config["modules"].items()))
    (directory / CONFIG).write_text(json.dumps(config))
    read = load_compact(directory).form
    for name in form.modules:
        assert torch.equal(read.delta(name).b, form.delta(name).b)
