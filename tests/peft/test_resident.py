"""Adapters that are held as codes: they do to the last bit what decoded ones do, come out of a model as they went in, and take
no more memory than they may."""

import copy
import gc
import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from bslora_convert import Recipe, compress, load_compact, load_into
from bslora_convert.behaviour.attach import decoded_of
from bslora_convert.bslora.decoded import Decoded
from bslora_convert.bslora.resident import Resident
from bslora_convert.bslora.storage import FORMAT_VERSION, CodedAdapter, load_coded
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.peft import BsloraLayer, load_many
from bslora_convert.peft.table import AdapterTable
from tests.conftest import FIXTURES
from tests.peft.routes import write
from tests.planting import drawn_lora

TINY = FIXTURES / "tiny"
WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(2, 66).reshape(4, 16)
RECIPES = {
    "none": Recipe(transform="none", bytes=0.25),
    "ke": Recipe(transform="ke", bytes=0.25, shared_size=32, min_shared=1),
    "gt": Recipe(transform="gt", bytes=0.25, shared_size=16, min_shared=1),
    "small": Recipe(transform="none", bytes=0.125),
    "drawn": Recipe(transform="none", bytes=0.125),
    "drawn-ke": Recipe(transform="ke", bytes=0.125, shared_size=32, min_shared=1),
}
CPU = torch.device("cpu")


def base(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any, **options: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS, **options).logits
    return found


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny adapters in codes, by the names of RECIPES."""
    place = tmp_path_factory.mktemp("library")
    drawn = drawn_lora(TINY / "gsm8k", tmp_path_factory.mktemp("drawn") / "lora")
    for name, recipe in RECIPES.items():
        source = drawn if "drawn" in name else TINY / ("banking77" if name == "small" else "gsm8k")
        compress(source, place / name, recipe, report_html=False)
    return place


def tuned(library: Path, name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    return PeftModel.from_pretrained(base(dtype), str(library / name), **options).eval()


def table(model: Any) -> AdapterTable:
    return next(module.table for module in model.modules() if isinstance(module, BsloraLayer))


@pytest.mark.parametrize("name", RECIPES)
def test_codes_do_what_floats_do_to_the_last_bit(library: Path, name: str) -> None:
    floats, codes = tuned(library, name, resident="floats"), tuned(library, name)
    expected = logits(floats)
    assert not torch.equal(expected, logits(base()))
    assert torch.equal(logits(codes), expected)
    held = table(codes).adapters["default"]
    assert held.is_decoded and not any("bslora" in key for key, _ in codes.named_parameters())
    stored = (library / name / WEIGHTS).stat().st_size
    assert held.codes_bytes < stored < held.decoded_bytes == table(codes).decoded.bytes
    table(codes).decoded.limit = 0  # module by module, from where each begins in the file
    assert torch.equal(logits(codes), expected) and not held.is_decoded


def test_what_modules_share_is_decoded_once(library: Path) -> None:
    model = tuned(library, "ke")
    found = [module.parts("default") for module in model.modules() if isinstance(module, BsloraLayer)]
    pairs = {pair.a.data_ptr() for _, _, uses in found for pair, _ in uses}
    assert len(pairs) < len([pair for _, _, uses in found for pair in uses])
    assert len(pairs) == sum(len(groups) for groups in load_compact(library / "ke").form.shared.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(library: Path, dtype: torch.dtype, autocast: bool) -> None:
    floats = tuned(library, "ke", dtype, resident="floats", autocast_adapter_dtype=autocast)
    codes = tuned(library, "ke", dtype, autocast_adapter_dtype=autocast)
    assert torch.equal(logits(codes), logits(floats))
    held = table(codes).adapters["default"]
    assert held.like.dtype == (torch.float32 if autocast else dtype)
    assert held.decoded_bytes == table(codes).decoded.bytes
    codes.half()
    floats.half()
    assert torch.equal(logits(codes), logits(floats)) and held.like.dtype == torch.float16
    assert torch.equal(held.codes["bslora_scales"], load_compact(library / "ke").codes["bslora_scales"])


def test_every_row_of_a_batch_names_its_adapter(library: Path) -> None:
    names = list(RECIPES)
    floats = load_many(base(), library, names, resident="floats")
    codes = load_many(base(), library, names)
    mixed = ["ke", "__base__", "small", "ke"], ["none", "gt", "ke", "small"]
    expected = [logits(floats, adapter_names=rows) for rows in mixed]
    one = max(held.decoded_bytes for held in codes.base_model._table.adapters.values())
    for room in (1 << 30, 2 * one, 0):  # of four adapters all, two or none stay decoded from layer to layer
        table(codes).decoded.limit = room
        for rows, wanted in zip(mixed, expected, strict=True):
            assert torch.equal(logits(codes, adapter_names=rows), wanted)
            assert table(codes).decoded.bytes <= room
    table(codes).decoded.limit = 2 * one
    generated = codes.generate(input_ids=IDS, adapter_names=mixed[1], max_new_tokens=2, do_sample=False)
    again = floats.generate(input_ids=IDS, adapter_names=mixed[1], max_new_tokens=2, do_sample=False)
    assert torch.equal(generated, again)


def test_merging_and_taking_out_again(library: Path) -> None:
    floats, codes = tuned(library, "ke", resident="floats"), tuned(library, "ke")
    before = logits(codes)
    for model in (floats, codes):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(logits(codes), logits(floats))
    codes.unmerge_adapter()
    torch.testing.assert_close(logits(codes), before, rtol=1e-3, atol=1e-3)
    assert torch.equal(logits(tuned(library, "ke").merge_and_unload()), logits(floats))


def test_what_is_saved_is_the_file_that_it_came_from(library: Path, tmp_path: Path) -> None:
    model = load_many(base(), library, {"default": "ke", "other": "small"})
    expected = logits(model)
    for held in table(model).adapters.values():
        held.half().float()
    model.save_pretrained(tmp_path / "saved")
    for place, name in ((tmp_path / "saved", "ke"), (tmp_path / "saved" / "other", "small")):
        assert (place / WEIGHTS).read_bytes() == (library / name / WEIGHTS).read_bytes()
        stored, again = load_compact(library / name), load_compact(place)
        assert again.config["format_version"] == FORMAT_VERSION and again.config["coding"] == stored.config["coding"]
        assert not {"resident", "decoded_bytes"} & set(again.config)
        assert again.config["modules"] == stored.config["modules"]
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(tmp_path / "saved"))), expected)


def test_a_deleted_adapter_is_gone(library: Path) -> None:
    model = load_many(base(), library, ["ke", "small"])
    for name in ("ke", "small"):
        model.set_adapter(name)
        logits(model)
    held = table(model)
    gone, codes = weakref.ref(held.adapters["ke"]), weakref.ref(held.adapters["ke"].codes["bslora_widths"])
    model.delete_adapter("ke")
    gc.collect()
    assert gone() is None and codes() is None
    assert list(held.adapters) == ["small"] and held.decoded.bytes == held.adapters["small"].decoded_bytes
    assert not any(".ke." in key for key in model.state_dict())
    assert torch.equal(logits(model), logits(tuned(library, "small")))
    model.set_adapter("small")
    model.delete_adapter("small")
    assert held.decoded.bytes == 0 and not held.adapters


def one_layer() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters of one layer in codes: a graph of more takes a minute to make."""
    place = tmp_path_factory.mktemp("narrow")
    for rank, name in ((4, "first"), (2, "second")):
        kinds = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.0.mlp.up_proj": (48, 32)}
        write(place / f"{name}-lora", kinds, rank, target_modules=["q_proj", "up_proj"])
        compress(place / f"{name}-lora", place / name, Recipe(transform="none", bits=4), report_html=False)
    return place


@pytest.mark.slow
def test_a_compiled_model_finds_an_active_adapter_decoded(narrow: Path) -> None:
    model = load_many(one_layer(), narrow, ["first", "second"])
    floats = load_many(one_layer(), narrow, ["first", "second"], resident="floats")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)  # no break: nothing is decoded inside
    for name in ("first", "second", "first"):
        for each in (model, floats):
            each.set_adapter(name)
        torch.testing.assert_close(logits(compiled), logits(floats), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_without_room_is_slower_and_no_other(narrow: Path) -> None:
    model = load_many(one_layer(), narrow, ["first"], decoded_bytes=0)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)
    assert table(model).decoded.bytes == 0
    table(model).decoded.limit = 1 << 30
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


def test_copies_casts_and_states(library: Path) -> None:
    model = tuned(library, "ke")
    expected = logits(model)
    twin = copy.deepcopy(model)
    assert table(twin) is not table(model) and torch.equal(logits(twin), expected)
    assert torch.equal(logits(tuned(library, "ke", low_cpu_mem_usage=True)), expected)
    other = tuned(library, "ke")
    codes = {key: tensor for key, tensor in other.state_dict().items() if "bslora_codes" in key}
    assert len(codes) == len(load_compact(library / "ke").codes)
    with torch.no_grad():
        next(tensor for key, tensor in codes.items() if "trellis" in key).zero_()
    table(other).adapters["default"].float()  # numbers of the old codes are let go
    assert not torch.equal(logits(other), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), expected)


# ------------------------------------------------------------------------------------------------------- bounds


def residents(library: Path, names: list[str], cache: Decoded) -> list[Resident]:
    found = []
    for name in names:
        read = load_coded(library / name)
        assert isinstance(read, CodedAdapter)
        found.append(Resident(read.layout, read.dtype, cache, lambda _: CPU))
        found[-1].fill(read.codes, name)
    return found


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30), st.floats(0, 3.5))
def test_never_more_is_decoded_than_may_be(library: Path, asked: list[tuple[int, int]], room: float) -> None:
    cache = Decoded()
    held = residents(library, ["none", "ke", "gt", "small"], cache)
    cache.limit = int(room * max(one.decoded_bytes for one in held))
    modules = list(held[0].layout.modules)
    for which, module in asked:
        local = held[which].parts(modules[module])[0]
        assert local.shape == held[which].layout.modules[modules[module]].shape
        decoded = [one for one in held if one.is_decoded]
        assert cache.bytes == sum(one.decoded_bytes for one in decoded) <= cache.limit
    cache.limit = 0
    assert not any(one.is_decoded for one in held)


def test_the_one_used_longest_ago_goes_first_and_none_that_is_as_busy(library: Path) -> None:
    cache = Decoded()
    first, second, third = residents(library, ["none", "none", "none"], cache)
    cache.limit = 2 * first.decoded_bytes
    modules = list(first.layout.modules)
    for one in (first, second, first, third):
        one.parts(modules[0])
    assert [one.is_decoded for one in (first, second, third)] == [True, False, True]
    for name in modules:  # as layers do that all three take turns on
        for one in (first, third, second):
            one.parts(name)
    assert [one.is_decoded for one in (first, second, third)] == [True, False, True]
    for name in modules:  # alone, it gets its place
        second.parts(name)
    assert second.is_decoded and third.is_decoded and not first.is_decoded


@pytest.mark.parametrize("wrong", [-1, 1.5, True])
def test_wrong_options_are_named(library: Path, wrong: Any) -> None:
    with pytest.raises(RecipeError, match="decoded_bytes is"):
        tuned(library, "small", decoded_bytes=wrong)
    with pytest.raises(RecipeError, match=r"resident is 'bits'.*codes, floats"):
        load_into(base(), library / "small", resident="bits")


# -------------------------------------------------------------------------------------------------- many at once


def calls(work: Callable[[], object]) -> int:
    """Functions that are called, Python's and C's, while something runs."""
    count = 0

    def note(_: FrameType, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("resident", ["codes", pytest.param("floats", marks=pytest.mark.slow)])
def test_the_fortieth_adapter_costs_what_the_third_does(library: Path, resident: str) -> None:
    model = load_many(base(), library, {"0": "ke", "1": "ke"}, resident=resident)

    def load(number: int) -> int:
        gc.disable()
        try:
            return calls(lambda: load_many(model, library, {str(number): "ke"}, resident=resident))
        finally:
            gc.enable()

    counts = [load(number) for number in range(2, 40)]
    assert max(counts[-5:]) <= 1.02 * min(counts[:5])
    model.set_adapter("39", inference_mode=True)  # what asks for gradients is multiplied by other kernels
    assert torch.equal(logits(model), logits(tuned(library, "ke", resident=resident)))


def test_many_on_a_model_are_what_each_is_alone(library: Path) -> None:
    model = load_many(base(), library, list(RECIPES))
    assert model.active_adapters == ["none"] and set(model.peft_config) == set(RECIPES)
    for name in RECIPES:
        model.set_adapter(name)
        assert torch.equal(logits(model), logits(tuned(library, name)))
    assert load_many(model, library, {"again": "ke"}, decoded_bytes=0) is model
    model.set_adapter("again")
    assert torch.equal(logits(model), logits(tuned(library, "ke")))
    assert table(model).decoded.bytes == 0


def test_one_that_can_not_be_loaded_leaves_the_model_as_it_was(library: Path, tmp_path: Path) -> None:
    model = load_many(base(), library, ["ke"])
    expected = logits(model)
    for wrong in ({"ke": "small"}, {"a.b": "small"}):
        with pytest.raises(RecipeError, match="give names as a mapping"):
            load_many(model, library, wrong)
    with pytest.raises(RecipeError, match="names is empty"):
        load_many(base(), library, [])
    with pytest.raises((InputError, ValueError), match="nobody"):
        load_many(model, library, ["nobody"])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    config = json.loads((library / "ke" / "adapter_config.json").read_text())
    (damaged / "adapter_config.json").write_text(json.dumps(config))
    (damaged / WEIGHTS).write_bytes((library / "small" / WEIGHTS).read_bytes())
    with pytest.raises(InputError, match="is expected"):
        load_many(model, tmp_path, ["damaged"])
    assert list(model.peft_config) == ["ke"] == list(table(model).adapters)
    assert torch.equal(logits(model), expected)


# ------------------------------------------------------------------------------------------------- other ways in


def test_what_is_to_be_trained_is_held_as_floats(library: Path) -> None:
    trained = tuned(library, "ke", is_trainable=True).train()
    trained(input_ids=IDS, labels=IDS).loss.backward()
    assert any(parameter.grad is not None for parameter in trained.parameters())
    with pytest.raises(RecipeError, match="held as codes, which can't be trained"):
        tuned(library, "ke").base_model.set_requires_grad("default")


def test_without_peft(library: Path) -> None:
    model, floats = base(), base()
    expected = {}
    for name in ("ke", "small"):
        with load_into(floats, library / name, resident="floats") as attached:
            expected[name] = logits(floats)
        attached.remove()
    adapters = {name: load_into(model, library / name) for name in ("ke", "small")}
    for name, other in (("ke", "small"), ("small", "ke")):
        adapters[name].enabled, adapters[other].enabled = True, False
        assert torch.equal(logits(model), expected[name])
    sizes = [adapter.resident.decoded_bytes for adapter in adapters.values() if adapter.resident]
    assert len(sizes) == 2 and decoded_of(model).bytes == sum(sizes)
    adapters["ke"].remove()
    assert decoded_of(model).bytes == sizes[1]
    adapters["small"].remove()
    assert decoded_of(model).bytes == 0 and torch.equal(logits(model), logits(base()))
    adapter = load_into(model, library / "ke", decoded_bytes=0)
    assert torch.equal(logits(model), expected["ke"]) and decoded_of(model).bytes == 0
    gone = weakref.ref(model)
    del model, adapter, adapters
    gc.collect()
    assert gone() is None


@pytest.mark.filterwarnings("ignore")
def test_transformers_own_loader_says_that_it_can_not(library: Path) -> None:
    model = base()
    model.load_adapter(str(library / "ke"))
    with pytest.raises(InputError, match=r"transformers' own load_adapter can't"):
        logits(model)
