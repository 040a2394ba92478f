"""Compact adapters in real PEFT models: what runs is the form, several stay apart, and what is saved is what was loaded."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, save_as_lora
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import bslora_convert.peft
from bslora_convert import Recipe, compress, expand, load_compact, load_into, save_compact
from bslora_convert.bslora.form import BsloraForm, Module
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice
from bslora_convert.errors import InputError
from bslora_convert.modules.factors import Factors
from bslora_convert.peft.register import register
from tests.conftest import FIXTURES
from tests.planting import plant

TINY = FIXTURES / "tiny"
BASE = TINY / "base"
WEIGHTS = "adapter_model.safetensors"
IDS = torch.arange(2, 66).reshape(4, 16)
RECIPES = {
    "ke": Recipe(transform="ke", ranks=(2, 2, 4), shared_size=32),
    "ke-2_r": Recipe(transform="ke", ranks=(1, 2, 4), kernel="2_r", shared_size=48),
    "ss": Recipe(transform="ss", ranks=(1, 2, 3)),
    "gt": Recipe(transform="gt", ranks=(3, 1, 1), shared_size=16),
    "none": Recipe(transform="none", ranks=(4, 0, 0)),
}
TINY_KINDS = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128), "mlp.up_proj": (256, 128), "mlp.down_proj": (128, 256),
}  # fmt: skip


def base(dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype).eval()


@torch.no_grad()
def logits(model: Any, **options: Any) -> torch.Tensor:
    return model(input_ids=IDS, **options).logits.float()


def close(first: torch.Tensor, second: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Relative to what adapters change: the base's own logits don't hide an error."""
    effect = float((second - logits(base())).norm())
    assert float((first - second).norm()) <= tolerance * effect


def save(form: BsloraForm, directory: Path) -> Path:
    directory.mkdir(parents=True)
    save_compact(form, directory, {"base_model_name_or_path": str(BASE), "task_type": "CAUSAL_LM"}, {})
    return directory


def planted(transform: Kronecker | Slice | Gate, directory: Path, seed: int, **options: Any) -> Path:
    """A random compact adapter of the tiny model; small enough that logits stay tame."""
    form = plant(transform, (1, 1, 2), seed=seed, kinds=options.pop("kinds", TINY_KINDS), **options)
    for tensor in form.tensors():
        tensor.mul_(0.2)
    return save(form, directory)


@pytest.fixture(scope="module")
def compact(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny adapter in each form, as float32."""
    place = tmp_path_factory.mktemp("compact")

    def make(name: str) -> Path:
        out = place / name
        if not out.exists():
            recipe = RECIPES[name].to_dict() | {"dtype": "float32"}
            compress(TINY / "gsm8k", out, Recipe.from_dict(recipe), report_html=False)
            config = json.loads((out / "adapter_config.json").read_text())
            (out / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(BASE)}))
        return out

    return make


def by_hand(directory: Path) -> torch.Tensor:
    """Logits with every delta of the form added to the base weights."""
    model, form = base(), load_compact(directory).form
    with torch.no_grad():
        for name in form.modules:
            delta = form.delta(name)
            model.get_submodule(name).weight += delta.b @ delta.a
    return logits(model)


@pytest.mark.parametrize("name", RECIPES)
def test_one_adapter_is_the_same_whichever_way_it_runs(
    name: str, compact: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = compact(name)
    expected = by_hand(directory)
    expand(directory, tmp_path / "lora")
    close(logits(PeftModel.from_pretrained(base(), str(tmp_path / "lora"))), expected)
    tuned = PeftModel.from_pretrained(base(), str(directory))
    close(logits(tuned), expected)
    close(logits(AutoPeftModelForCausalLM.from_pretrained(str(directory), dtype=torch.float32)), expected)
    attached = base()
    with load_into(attached, directory) as adapter:
        close(logits(attached), expected)
        assert adapter.enabled
    assert torch.equal(logits(attached), logits(base()))
    close(logits(tuned.merge_and_unload()), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", RECIPES)
def test_saving_again_is_bit_exact_and_no_bigger(name: str, dtype: str, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    compress(TINY / "gsm8k", first, Recipe.from_dict(RECIPES[name].to_dict() | {"dtype": dtype}), report_html=False)
    model = PeftModel.from_pretrained(base(), str(first))
    model.save_pretrained(second)
    stored, again = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    assert stored.keys() == again.keys()
    for key, tensor in stored.items():
        assert again[key].dtype == tensor.dtype
        assert torch.equal(again[key], tensor)
    assert (second / WEIGHTS).stat().st_size <= (first / WEIGHTS).stat().st_size
    form, reread = load_compact(first).form, load_compact(second).form
    assert list(reread.modules) == list(form.modules)
    for module in form.modules:
        assert torch.equal(reread.delta(module).b, form.delta(module).b)
        assert torch.equal(reread.delta(module).a, form.delta(module).a)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(second))), logits(model))


@pytest.fixture
def three(tmp_path: Path) -> dict[str, Path]:
    """Adapters with other transforms, ranks, targets, and so other owners of their pairs."""
    some = {kind: TINY_KINDS[kind] for kind in ("self_attn.q_proj", "mlp.up_proj")}
    return {
        "first": planted(Kronecker(32), tmp_path / "first", 1),
        "second": planted(Kronecker(32), tmp_path / "second", 2, kernel_ranks=(1, 2)),
        "third": planted(Slice(256, 128), tmp_path / "third", 3, kinds=some),
        "fourth": planted(Gate(8), tmp_path / "fourth", 4, layers=2),
    }


def all_loaded(directories: dict[str, Path], **options: Any) -> Any:
    (first, place), *others = directories.items()
    model = PeftModel.from_pretrained(base(), str(place), adapter_name=first, **options)
    for name, other in others:
        model.load_adapter(str(other), name, **options)
    return model.eval()


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapters_on_one_model_never_touch_each_other(three: dict[str, Path], low_cpu_mem_usage: bool) -> None:
    alone = {name: by_hand(directory) for name, directory in three.items()}
    model = all_loaded(three, low_cpu_mem_usage=low_cpu_mem_usage)
    for name in (*three, *reversed(three)):
        model.set_adapter(name)
        close(logits(model), alone[name])
    pairs: dict[str, set[int]] = {}
    for layer in layers(model):
        for adapter in layer.shared:
            pairs.setdefault(adapter, set()).update(pair.a.data_ptr() for pair, _ in layer.parts(adapter)[2])
    assert {adapter: len(kept) for adapter, kept in pairs.items()} == {"first": 5, "second": 5, "third": 5, "fourth": 3}
    assert len(set().union(*pairs.values())) == 18
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(base()))
    model.base_model.set_adapter(["first", "third"])  # two at once add up
    both = base()
    with torch.no_grad():
        for name in ("first", "third"):
            form = load_compact(three[name]).form
            for module in form.modules:
                delta = form.delta(module)
                both.get_submodule(module).weight += delta.b @ delta.a
    close(logits(model), logits(both))


def layers(model: Any) -> list[bslora_convert.peft.BsloraLayer]:
    return [module for module in model.modules() if isinstance(module, bslora_convert.peft.BsloraLayer)]


def test_deleting_an_adapter_leaves_the_others_whole(three: dict[str, Path]) -> None:
    alone = {name: by_hand(directory) for name, directory in three.items()}
    model = all_loaded(three)
    model.set_adapter("second")
    model.delete_adapter("first")
    close(logits(model), alone["second"])
    assert not any(".first." in key for key in model.state_dict())
    assert all("first" not in layer.shared for layer in layers(model))
    model.load_adapter(str(three["fourth"]), "first")  # the name again, for something else
    model.set_adapter("first")
    close(logits(model), alone["fourth"])
    model.delete_adapter("third")
    model.set_adapter("second")
    close(logits(model), alone["second"])


def test_every_row_of_a_batch_names_its_adapter(three: dict[str, Path]) -> None:
    alone = {name: by_hand(directory) for name, directory in three.items()} | {"__base__": logits(base())}
    model = all_loaded(three)
    for names in (["second", "__base__", "third", "second"], ["fourth", "first", "first", "third"]):
        mixed = logits(model, adapter_names=names)
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone[name][row], rtol=1e-4, atol=1e-4)
    generated = model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=4, do_sample=False)
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone_again = model.generate(input_ids=IDS[row : row + 1], max_new_tokens=4, do_sample=False)
        assert torch.equal(generated[row], alone_again[0])
    beams = model.generate(input_ids=IDS, adapter_names=names, max_new_tokens=3, num_beams=2, do_sample=False)
    assert beams.shape[0] == len(IDS)
    with pytest.raises(ValueError, match=r"non-existing adapter.*nobody"):
        logits(model, adapter_names=["nobody", "first", "first", "first"])
    with pytest.raises(ValueError, match="inference"):
        logits(model.train(), adapter_names=names)


def test_merging_and_taking_out_again(three: dict[str, Path]) -> None:
    model = all_loaded(three)
    model.set_adapter("first")
    expected = logits(model)
    model.merge_adapter(safe_merge=True)
    close(logits(model), expected)
    with model.disable_adapter():  # unmerges by itself
        close(logits(model) + expected, logits(base()) + expected, 1e-4)
    close(logits(model), expected, 1e-4)
    model.merge_adapter(["first", "second"])
    model.unmerge_adapter()
    model.set_adapter("second")
    close(logits(model), by_hand(three["second"]), 1e-4)


def test_each_adapter_of_several_is_saved_apart(three: dict[str, Path], tmp_path: Path) -> None:
    model = all_loaded(three)
    model.save_pretrained(tmp_path / "all")
    for name, directory in three.items():
        stored, again = load_file(directory / WEIGHTS), load_file(tmp_path / "all" / name / WEIGHTS)
        assert stored.keys() == again.keys()
        assert all(torch.equal(again[key], tensor) for key, tensor in stored.items())


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision(compact: Callable[[str], Path], autocast: bool) -> None:
    model = PeftModel.from_pretrained(
        base(torch.bfloat16), str(compact("ke")), autocast_adapter_dtype=autocast, low_cpu_mem_usage=not autocast
    )
    assert {p.dtype for n, p in model.named_parameters() if ".default." in n} <= {torch.float32, torch.bfloat16}
    assert logits(model).isfinite().all()
    close(logits(model), by_hand(compact("ke")), 0.1)


def test_a_device_map_and_a_deep_copy(compact: Callable[[str], Path]) -> None:
    mapped = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, device_map={"": "cpu"}).eval()
    model = PeftModel.from_pretrained(mapped, str(compact("ke")), device_map={"": "cpu"})
    expected = by_hand(compact("ke"))
    close(logits(model), expected)
    twin = copy.deepcopy(model)
    close(logits(twin), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    close(logits(model), expected)


def test_transformers_own_loader(compact: Callable[[str], Path]) -> None:
    model = base()
    model.load_adapter(str(compact("ke")))
    close(logits(model), by_hand(compact("ke")))
    model.load_adapter(str(compact("ss")), adapter_name="other")
    model.set_adapter("other")
    close(logits(model), by_hand(compact("ss")))


@pytest.mark.parametrize(
    ("train", "trained"), [("all", {"local", "shared"}), ("local", {"local"}), ("shared", {"shared"})]
)
def test_gradients_reach_what_the_configuration_says(
    train: str, trained: set[str], compact: Callable[[str], Path], tmp_path: Path
) -> None:
    config = bslora_convert.peft.BsloraConfig.from_pretrained(str(compact("ke")))
    config.train = train
    model = PeftModel.from_pretrained(base(), str(compact("ke")), config=config, is_trainable=True).train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        part = "local" if "bslora_local" in name else "shared" if "bslora_" in name else "base"
        assert torch.equal(parameter, before[name]) == (part not in trained), name
    # What was trained no longer fits the stored type and is saved as it is.
    model.save_pretrained(tmp_path / "trained")
    close(logits(PeftModel.from_pretrained(base(), str(tmp_path / "trained"))), logits(model.eval()))


def test_gradient_checkpointing_changes_nothing(compact: Callable[[str], Path]) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = PeftModel.from_pretrained(base(), str(compact("ke")), is_trainable=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.enable_input_require_grads()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_logits(compact: Callable[[str], Path]) -> None:
    model = PeftModel.from_pretrained(base(), str(compact("ke")))
    expected = logits(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-4, atol=1e-4)


def test_peft_converts_it_to_lora_too(compact: Callable[[str], Path], tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(base(), str(compact("ke")))
    save_as_lora(str(tmp_path / "lora"), model, rank=8)  # 2 + 2 + 4: nothing is cut
    close(logits(PeftModel.from_pretrained(base(), str(tmp_path / "lora"))), logits(model), 1e-4)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=100, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def test_transposed_weights_and_embeddings(tmp_path: Path) -> None:
    """GPT-2's Conv1D keeps (in, out); an embedding's update is looked up."""
    kinds = {"attn.c_attn": (72, 24), "mlp.c_fc": (96, 24), "mlp.c_proj": (24, 96)}
    form = plant(Kronecker(24), (2, 1, 2), layers=2, kinds=kinds)
    modules: dict[str, Module] = {name.replace("model.layers", "transformer.h"): m for name, m in form.modules.items()}
    table = Factors(torch.randn(24, 3), torch.randn(3, 100))
    modules["transformer.wte"] = Module((24, 100), table, {}, "embedding")
    form = replace(form, modules=modules)
    for tensor in form.tensors():
        tensor.mul_(0.1)
    directory = tmp_path / "compact"
    directory.mkdir()
    save_compact(form, directory, {"base_model_name_or_path": "gpt2", "fan_in_fan_out": True}, {})
    ids = torch.arange(40).reshape(2, 20)
    expected = gpt2()
    expected.lm_head.weight = torch.nn.Parameter(expected.lm_head.weight.clone())  # the head is tied and not adapted
    with torch.no_grad():
        for name in form.modules:
            delta = form.delta(name)
            expected.get_submodule(name).weight += (delta.b @ delta.a).T
        wanted = expected(input_ids=ids).logits
        model = PeftModel.from_pretrained(gpt2(), str(directory))
        torch.testing.assert_close(model(input_ids=ids).logits, wanted)
        attached = gpt2()
        load_into(attached, directory)
        torch.testing.assert_close(attached(input_ids=ids).logits, wanted)
        delta = form.delta("transformer.h.0.mlp.c_fc")
        layer = model.get_submodule("base_model.model.transformer.h.0.mlp.c_fc")
        torch.testing.assert_close(layer.get_delta_weight("default"), (delta.b @ delta.a).T)


def test_a_quantised_base(compact: Callable[[str], Path]) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    model = base()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and name != "lm_head":
            quantised = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32
            )
            quantised.load_state_dict(layer.state_dict())
            model.set_submodule(name, quantised.to("cpu"))
    plain = logits(model)
    tuned = PeftModel.from_pretrained(model, str(compact("ke")), is_trainable=True)
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), plain)
    adapted = logits(tuned)
    effect = float((by_hand(compact("ke")) - logits(base())).norm())
    assert float((adapted - plain).norm()) > 0.5 * effect
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in tuned.named_parameters() if "bslora_" in n)
    tuned.merge_adapter()
    assert float((logits(tuned) - adapted).norm()) < 0.5 * effect


# ---------------------------------------------------------------------------------------------- what can't be


def test_other_models_are_refused(compact: Callable[[str], Path], tmp_path: Path) -> None:
    small = plant(Kronecker(32), (1, 1, 2), kinds={"self_attn.q_proj": (64, 64)})
    deep = plant(Kronecker(32), (1, 1, 2), layers=6, kinds={"self_attn.q_proj": (128, 128)})
    for form, words in ((small, "128 x 128 in the base model, 64 x 64"), (deep, "2 of 6 adapted modules are missing")):
        directory = save(form, tmp_path / words.split()[0])
        with pytest.raises(InputError, match=words):
            PeftModel.from_pretrained(base(), str(directory))
        with pytest.raises(InputError, match=words):
            load_into(base(), directory)


def test_broken_configurations_are_refused(compact: Callable[[str], Path], tmp_path: Path) -> None:
    config = json.loads((compact("ke") / "adapter_config.json").read_text())
    for change, words in (({"format_version": 9}, "format_version is 9"), ({"modules": {}}, "modules is empty")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=words):
            bslora_convert.peft.BsloraConfig.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=r"train is 'some'.*local, shared, all"):
        bslora_convert.peft.BsloraConfig(**{**config, "train": "some", "peft_type": None})


@pytest.mark.slow
def test_registering_twice_is_once_and_not_importing_is_a_key_error(compact: Callable[[str], Path]) -> None:
    register()
    register()
    code = (
        "from peft import PeftConfig\n"
        "try:\n    PeftConfig.from_pretrained({0!r})\nexcept KeyError as error:\n    print(error)\n"
        "import bslora_convert.peft\nprint(type(PeftConfig.from_pretrained({0!r})).__name__)"
    ).format(str(compact("ke")))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["'BSLORA'", "BsloraConfig"]


@pytest.mark.parametrize("transform", ["none", "ke", "gt"])
def test_codes_held_as_floats_run_as_their_expansion_and_are_saved_as_floats(tmp_path: Path, transform: str) -> None:
    recipe = Recipe(transform=transform, bytes=0.25, dtype="float32", shared_size=32 if transform != "none" else None)
    record = compress(TINY / "gsm8k", tmp_path / "coded", recipe, report_html=False)
    assert record["compact"]["bytes"] <= 0.25 * record["source"]["bytes"]
    expand(tmp_path / "coded", tmp_path / "lora")
    model = PeftModel.from_pretrained(base(), str(tmp_path / "coded"), resident="floats").eval()
    expected = logits(PeftModel.from_pretrained(base(), str(tmp_path / "lora")).eval())
    close(logits(model), expected)
    plain = base()
    attached = load_into(plain, tmp_path / "coded", resident="floats")
    close(logits(plain), expected)
    attached.remove()
    model.save_pretrained(str(tmp_path / "saved"))
    again = load_compact(tmp_path / "saved")
    assert not again.codes
    for name, tensor in zip(again.form.tensors(), load_compact(tmp_path / "coded").form.tensors(), strict=True):
        assert torch.equal(name, tensor)
