"""Adapters that start in BSLoRA form: what is adapted and shared, where training starts, and trainers that save and resume."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from bslora_convert import Recipe, Training, compress, expand, finetune, inspect, load_compact, load_into, verify
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.peft import BsloraConfig, BsloraLayer, Init
from tests.peft.test_tuner import BASE, IDS, TINY, base, close, logits

RANKS = (2, 3, 4)
FORMS: dict[str, dict[str, Any]] = {
    "ke": {"transform": "ke", "ranks": RANKS, "shared_size": 32},
    "ke-2_r": {"transform": "ke", "ranks": RANKS, "kernel": "2_r", "shared_size": 48},
    "gt": {"transform": "gt", "ranks": RANKS, "shared_size": 16},
    "ss": {"transform": "ss", "ranks": RANKS},
    "ss-kind": {"transform": "ss", "ranks": (0, 4, 0), "groups": "kind", "slice": "top-left"},
    "none": {"transform": "none", "ranks": (4, 0, 0)},
}


def fresh(name: str = "ke", **options: Any) -> PeftModel:
    """A new adapter on the tiny model."""
    model = base()
    return get_peft_model(model, BsloraConfig.new(model, **FORMS[name], task_type="CAUSAL_LM", **options))


def step(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """One step; gives the gradients that it took."""
    optimizer.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def trained(name: str = "ke", steps: int = 4, **options: Any) -> PeftModel:
    model = fresh(name, init=Init(seed=1), **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        step(model, optimizer)
    return model.eval()


def numbers(config: BsloraConfig) -> int:
    return sum(rows * columns for _, (rows, columns) in config.layout().stored())


@pytest.fixture(scope="module")
def llamas() -> dict[str, Any]:
    """The paper's models, without numbers."""
    sizes = {
        "llama-1-7b": (4096, 11008, 32, 32, 32), "llama-3-8b": (4096, 14336, 32, 32, 8), "llama-1-13b": (5120, 13824, 40, 40, 40)
    }  # fmt: skip
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    with torch.device("meta"):
        return {
            model: LlamaForCausalLM(LlamaConfig(**dict(zip(names, size, strict=True)), vocab_size=64))
            for model, size in sizes.items()
        }


@pytest.mark.parametrize(
    ("model", "transform", "ranks", "published"),
    [
        ("llama-1-7b", "ss", "llama-1-7b", 7_028_736), ("llama-1-7b", "gt", "llama-1-7b", 8_224_768),
        ("llama-1-7b", "ke", "llama-1-7b", 3_659_136), ("llama-1-7b", "ke", (2, 4, 16), 3_593_600),
        ("llama-3-8b", "ss", "llama-3-8b", 7_667_712), ("llama-3-8b", "gt", "llama-3-8b", 8_028_160),
        ("llama-3-8b", "ke", "llama-3-8b", 3_700_224), ("llama-3-8b", "ss", (8, 16, 32), 29_753_344),
        ("llama-3-8b", "gt", (0, 4, 8), 4_472_832), ("llama-3-8b", "ke", (16, 32, 32), 28_866_048),
        ("llama-1-13b", "ss", "llama-1-13b", 10_133_504), ("llama-1-13b", "gt", "llama-1-13b", 12_140_544),
        ("llama-1-13b", "ke", "llama-1-13b", 5_682_112),
    ],
)  # fmt: skip
def test_parameters_are_those_of_the_paper(
    model: str, transform: str, ranks: Any, published: int, llamas: dict[str, Any]
) -> None:
    assert numbers(BsloraConfig.new(llamas[model], transform, ranks)) == published


def test_gates_of_every_size(llamas: dict[str, Any]) -> None:
    sizes = {512: 7_618_560, 1024: 8_224_768, 2048: 9_437_184}
    found = {s: numbers(BsloraConfig.new(llamas["llama-1-7b"], "gt", "paper", shared_size=s)) for s in sizes}
    assert found == sizes


@pytest.mark.parametrize("name", FORMS)
def test_a_new_adapter_changes_nothing_and_has_the_layouts_numbers(name: str) -> None:
    model = fresh(name)
    assert torch.equal(logits(model), logits(base()))
    assert model.get_nb_trainable_parameters()[0] == numbers(model.peft_config["default"])


@pytest.mark.parametrize("name", FORMS)
def test_gradients_reach_b_at_first_and_then_everything(name: str) -> None:
    model = fresh(name, init=Init(seed=1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for key, gradient in step(model, optimizer).items():
        assert gradient.any() == (key.split(".")[-2] in ("bslora_local_B", "bslora_intra_B", "bslora_inter_B")), key
    assert all(gradient.any() for gradient in step(model, optimizer).values())


@pytest.mark.parametrize("name", FORMS)
def test_the_gradient_of_a_part_is_that_of_twice_its_product(name: str) -> None:
    """Against autograd through deltas that are built dense from the tensors."""
    model = trained(name, steps=1)
    held = {key: p for key, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    ours = {key: p.grad.clone() for key, p in held.items()}
    layers = {name: layer for name, layer in model.named_modules() if hasattr(layer, "get_delta_weight")}
    plain = base()
    weights = {
        name: plain.get_submodule(name.removeprefix("base_model.model.")).weight + layer.get_delta_weight("default")
        for name, layer in layers.items()
    }
    named = {f"{name.removeprefix('base_model.model.')}.weight": weight for name, weight in weights.items()}
    loss = torch.func.functional_call(plain, named, kwargs={"input_ids": IDS, "labels": IDS}).loss
    for key, gradient in zip(held, torch.autograd.grad(loss, list(held.values())), strict=True):
        torch.testing.assert_close(ours[key], gradient, rtol=1e-3, atol=1e-6)


def test_parts_that_are_not_trained_get_no_gradient() -> None:
    model = fresh(train="local")
    got = {key.split(".")[-2] for key, p in model.named_parameters() if p.requires_grad}
    assert got == {"bslora_local_A", "bslora_local_B"}


def test_numbers_follow_from_the_seed_alone() -> None:
    def tensors(model: PeftModel) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in model.named_parameters() if "bslora_" in name}

    first, other = tensors(fresh(init=Init(seed=1))), tensors(fresh(init=Init(seed=2)))
    torch.manual_seed(5)
    again = tensors(fresh(init=Init(seed=1)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = [name for name in first if not torch.equal(first[name], other[name])]
    assert len(differing) == len(
        [name for name in first if not name.split(".")[-2].endswith(("local_B", "ra_B", "er_B"))]
    )
    torch.manual_seed(5)
    drawn = tensors(fresh())
    torch.manual_seed(5)
    assert all(torch.equal(drawn[name], tensor) for name, tensor in tensors(fresh()).items())


@pytest.mark.parametrize(
    ("init", "name", "deviation", "largest"),
    [
        (Init(), "local_A", 256**-0.5, None),
        (Init(a="kaiming_uniform"), "local_A", (3 * 256) ** -0.5, 256**-0.5),
        (Init(), "intra_own_A", (3 * 256) ** -0.5, None),
        (Init("kaiming_uniform"), "inter_own_output_down", (3 * 256) ** -0.5, 256**-0.5),
        (Init("ones"), "intra_own_B", 0.0, 1.0),
        (Init("ones"), "intra_B", 0.0, 0.0),
    ],
)
def test_every_draw_has_its_deviation(init: Init, name: str, deviation: float, largest: float | None) -> None:
    torch.manual_seed(0)
    drawn = init.numbers("layers.0.q", name, (256, 256))
    assert float(drawn.std()) == pytest.approx(deviation, rel=0.02)
    if largest is not None:
        assert float(drawn.abs().max()) == pytest.approx(largest, rel=0.01)


@pytest.mark.parametrize("name", FORMS)
def test_the_scaling_is_folded_in_files_and_taken_out_on_models(name: str, tmp_path: Path) -> None:
    model = trained(name)
    expected = logits(model)
    model.save_pretrained(tmp_path / "saved")
    said = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert not {"scaling", "init", "resident"} & set(said)
    form = load_compact(tmp_path / "saved").form
    for module in form.modules:
        delta, layer = form.delta(module), model.base_model.model.get_submodule(module)
        torch.testing.assert_close(delta.b @ delta.a, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
        assert torch.equal(form.modules[module].local.b, 2 * layer.bslora_local_B["default"])
    loaded = PeftModel.from_pretrained(base(), str(tmp_path / "saved"))
    close(logits(loaded), expected, 1e-6)
    live = PeftModel.from_pretrained(base(), str(tmp_path / "saved"), is_trainable=True, scaling=2.0)
    held = dict(model.named_parameters())
    for key, parameter in live.named_parameters():
        assert torch.equal(parameter, held[key]), key
    live.save_pretrained(tmp_path / "again")
    files = [(tmp_path / place / "adapter_model.safetensors").read_bytes() for place in ("saved", "again")]
    assert files[0] == files[1]
    close(logits(model.merge_and_unload()), expected)


def test_a_scaling_that_is_no_power_of_two(tmp_path: Path) -> None:
    model = trained(scaling=3.0)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(base(), str(tmp_path))), expected)
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    close(logits(model), expected)


def test_adapters_beside_each_other_share_nothing(tmp_path: Path) -> None:
    model = trained()
    expected = logits(model)
    model.add_adapter("second", BsloraConfig.new(model, "ss", RANKS, task_type="CAUSAL_LM"))
    assert torch.equal(logits(model), expected)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(base()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    step(model, optimizer)
    model.set_adapter("default")
    assert torch.equal(logits(model), expected)


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": ids, "labels": ids} for ids in torch.cat([IDS, IDS.flip(0)])]


def trainer(model: Any, out: Path, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, save_steps=2, save_strategy="steps",
        report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1, seed=3, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=rows(), eval_dataset=rows()[:2])


@pytest.mark.parametrize("name", ["ke", "gt", "ss"])
def test_a_run_of_the_trainer_that_resumes_is_the_one_that_did_not_stop(name: str, tmp_path: Path) -> None:
    whole = trainer(fresh(name, init=Init(seed=1)), tmp_path / "run")
    whole.train()
    expected = {key: p for key, p in whole.model.named_parameters() if "bslora_" in key}
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        assert load_compact(tmp_path / "run" / checkpoint).form.transform_name == name
    resumed = trainer(fresh(name, init=Init(seed=7)), tmp_path / "other")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    found = dict(resumed.model.named_parameters())
    for key, parameter in expected.items():
        assert torch.equal(found[key], parameter), key


def test_the_trainer_loads_the_best_model(tmp_path: Path) -> None:
    run = trainer(fresh(), tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
                  metric_for_best_model="loss", greater_is_better=True)  # fmt: skip
    run.train()
    assert str(run.state.best_model_checkpoint).endswith("checkpoint-2")
    close(logits(run.model.eval()), logits(PeftModel.from_pretrained(base(), str(tmp_path / "checkpoint-2"))))


def test_trl_trains_it_as_it_does_lora(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="pip install -c constraints.txt trl")
    from datasets import Dataset

    model = base()
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", use_cpu=True,
        disable_tqdm=True, max_length=32, save_strategy="no", bf16=False, gradient_checkpointing=False,
    )  # fmt: skip
    run = trl.SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list([{"text": "to be or not to be"}] * 4),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=BsloraConfig.new(model, **FORMS["ke"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    run.train()
    run.save_model(str(tmp_path / "saved"))
    close(logits(PeftModel.from_pretrained(base(), str(tmp_path / "saved"))), logits(run.model.eval()))


@pytest.mark.parametrize("name", ["ke", "gt", "ss-kind"])
def test_every_verb_takes_what_was_trained(name: str, tmp_path: Path) -> None:
    model = trained(name)
    expected = logits(model)
    model.save_pretrained(tmp_path / "compact")
    assert inspect(tmp_path / "compact")["parameters"] == model.get_nb_trainable_parameters()[0]
    expand(tmp_path / "compact", tmp_path / "lora")
    close(logits(PeftModel.from_pretrained(base(), str(tmp_path / "lora"))), expected)
    coded = compress(tmp_path / "lora", tmp_path / "coded", Recipe(transform="none", bytes=0.25), report_html=False)
    assert coded["weight"]["relative_error"] < 0.1
    assert json.loads((tmp_path / "coded" / "adapter_config.json").read_text())["coding"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join((TINY / "gsm8k-heldout.jsonl").read_text().splitlines(keepends=True)[:4]))
    for adapter, kept in (("compact", 0.99999), ("coded", 0.9)):
        found = verify(
            tmp_path / adapter, tmp_path / "lora", BASE, prompts=prompts, any_reference=True, max_new_tokens=4,
            chat_template=False,
        )  # fmt: skip
        assert found["retention"] is not None
        assert found["retention"] > kept
    plain = base()
    with load_into(plain, tmp_path / "compact"):
        close(logits(plain), expected)
    finetune(
        tmp_path / "compact", tmp_path / "tuned", tmp_path / "lora", str(BASE), prompts,
        Training("all", max_steps=1, heldout=0.5, chat_template=False, max_new_tokens=4), report_html=False,
    )  # fmt: skip
    assert load_compact(tmp_path / "tuned").form.parameters == model.get_nb_trainable_parameters()[0]


def test_codes_of_what_was_trained_from_a_seed_need_no_search(tmp_path: Path) -> None:
    """Uniform local A's are draws of the seed, their places are recorded, and `compress` takes them from the record."""
    init = Init(a="kaiming_uniform", seed=618_033_988)
    model = fresh("ke", init=init)
    config = model.peft_config["default"]
    layer = next(m for m in model.modules() if isinstance(m, BsloraLayer))
    assert config.drawn["seed"] == 618_033_988 and set(config.drawn["places"]) == set(config.layout().modules)
    drawn = layer.bslora_local_A["default"]
    assert float(drawn.abs().max()) <= drawn.shape[1] ** -0.5 and float(drawn.std()) == pytest.approx(
        (3 * drawn.shape[1]) ** -0.5, rel=0.1
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        step(model, optimizer)
    model.save_pretrained(tmp_path / "compact")
    assert load_compact(tmp_path / "compact").config["drawn"] == config.drawn
    expand(tmp_path / "compact", tmp_path / "lora")
    done = compress(tmp_path / "lora", tmp_path / "coded", Recipe(transform="none", bytes=0.25), report_html=False)
    assert done.initialisation is not None and done.initialisation.seed == 618_033_988
    assert done.initialisation.modules == len(config.drawn["places"])
    (tmp_path / "lora" / "expansion.json").write_text('{"drawn": {"seed": true, "places": {"x": [0, 1, 2]}}}')
    without = compress(tmp_path / "lora", tmp_path / "plain", Recipe(transform="none", bytes=0.25), report_html=False)
    assert without.initialisation is None


def test_groups_by_kind_without_a_local_part_share_both_sides_across_layers(tmp_path: Path) -> None:
    """What Tied-LoRA's TL5 and ShareLoRA's AB are: every layer's module of a kind has one update."""
    model = trained("ss-kind")
    model.save_pretrained(tmp_path)
    form = load_compact(tmp_path).form
    kinds: dict[str, set[bytes]] = {}
    for name in form.modules:
        delta = form.delta(name)
        product = delta.b @ delta.a
        assert product.any()
        kinds.setdefault(name.split(".", 3)[3], set()).add(product.numpy().tobytes())
    assert {kind: len(products) for kind, products in kinds.items()} == dict.fromkeys(kinds, 1)
    assert len(kinds) == 5
    assert len(set().union(*kinds.values())) == 5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": "all-linear"}, 7 * 4),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": r".*\.(q|v)_proj"}, 8),
        ({"target_modules": ["q_proj", "o_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]}, 7),
        ({"groups": {"attention": ["*.q_proj", "*.k_proj"]}}, 5 * 4),
        ({"target_modules": ["q_proj", "embed_tokens"]}, 5),
    ],
)
def test_targets_are_pefts(options: dict[str, Any], expected: int, tmp_path: Path) -> None:
    model = fresh(**options)
    layout = model.peft_config["default"].layout()
    assert len(layout.modules) == expected
    assert {bool(entry.groups) for entry in layout.modules.values() if entry.kind != "linear"} <= {False}
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), str(tmp_path))), logits(base()))


def test_transposed_layers() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=64)).eval()
    config = BsloraConfig.new(model, "ke", RANKS, ["c_attn", "c_proj"], shared_size=16)
    assert {entry.shape for entry in config.layout().modules.values()} == {(96, 32), (32, 32), (32, 128)}
    before = logits(model)
    assert torch.equal(logits(get_peft_model(model, config)), before)


def wrong(**options: Any) -> Callable[[], Any]:
    return lambda: BsloraConfig.new(base(), **options)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (wrong(transform="auto"), RecipeError, "transform is 'auto'"),
        (wrong(ranks=(2, 4)), RecipeError, "ranks is"),
        (wrong(ranks=(2, -1, 4)), RecipeError, "ranks is -1"),
        (wrong(ranks=(0, 0, 0)), RecipeError, "above zero"),
        (wrong(ranks="llama-2"), RecipeError, "llama-1-7b"),
        (wrong(transform="none", ranks=(2, 4, 0)), RecipeError, "nothing is shared"),
        (wrong(transform="gt", kernel="2_r"), RecipeError, "kernel"),
        (wrong(transform="ss", shared_size=32), RecipeError, "shared_size"),
        (wrong(init="zeros"), RecipeError, "init is 'zeros'"),
        (wrong(init=3), RecipeError, "init is 3"),
        (wrong(scaling=0), RecipeError, "scaling is 0"),
        (wrong(scaling=float("nan")), RecipeError, "scaling is nan"),
        (wrong(train="some"), RecipeError, "train is 'some'"),
        (wrong(groups={"a": ["nothing"]}), RecipeError, "groups match none"),
        (wrong(groups="missing.json"), InputError, "no such file"),
        (wrong(target_modules=["query"]), InputError, "the model has none of them; it has .*q_proj"),
        (wrong(target_modules=["mlp"]), InputError, "can't be adapted"),
        (wrong(target_modules=["embed_tokens"]), InputError, "none can share"),
    ],
)
def test_wrong_options_are_named(call: Callable[[], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        call()
