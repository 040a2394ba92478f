"""`analyze` as a user meets it, and groups that `compress` takes from it."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

import bslora_convert.peft  # noqa: F401  registers the tuner
from bslora_convert import Recipe, analyze, compress, load_compact, load_lora
from bslora_convert.cli import main
from bslora_convert.conversion.groups import match, read_groups
from bslora_convert.errors import InputError, RecipeError
from tests.analysis.test_measures import two_families
from tests.conftest import FIXTURES
from tests.planting import KINDS, random_products, write_lora

TINY = FIXTURES / "tiny"
TOP = {"modules", "rmi_within", "rmi_across", "shared_energy", "shared_initialisation", "groups", "recommendation"}


def run(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return done.exit_code, done.stdout, done.stderr


def test_everything_is_written_and_the_record_is_the_json(tmp_path: Path) -> None:
    out = tmp_path / "analysis"
    code, stdout, _ = run("analyze", TINY / "gsm8k", "--out", out, "--draws", 2, "--json")
    assert code == 0
    record = json.loads(stdout)
    assert set(record) >= TOP
    assert record == json.loads((out / "analysis.json").read_text())
    assert {row for levels in record["shared_energy"].values() for row in levels} == {"intra", "inter"}
    assert {"energy", "null_mean", "null_std", "z"} <= set(record["shared_energy"]["ke"]["inter"])
    plots = {"effective_rank", "rmi_across", "rmi_within", "shared_energy", "similarity_layers"}
    assert {path.name for path in out.iterdir()} == {
        "analysis.json", "analysis.html", *(f"{plot}.{end}" for plot in plots for end in ("svg", "png"))
    }  # fmt: skip
    page = (out / "analysis.html").read_text()
    assert "Is there anything to share?" in page
    assert "http" not in page.replace("http-equiv", "")
    code, stdout, _ = run("analyze", TINY / "gsm8k", "--draws", 2)
    assert "of the energy fits in" in stdout
    code, _, stderr = run("analyze", TINY / "gsm8k", "--out", out)
    assert code == 2
    assert "not empty" in stderr


@pytest.mark.slow
def test_the_same_seed_gives_the_same_files(tmp_path: Path) -> None:
    for name in ("first", "second"):
        analyze(TINY / "gsm8k", tmp_path / name, draws=2, seed=5)
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


def test_activations_and_other_adapters(tmp_path: Path) -> None:
    record = analyze(
        TINY / "gsm8k", beside=[TINY / "banking77", TINY / "gsm8k"], base_model=str(TINY / "base"),
        prompts=TINY / "gsm8k-heldout.jsonl", limit=4, draws=2,
    )  # fmt: skip
    layers = record["activations"]["rmi_across"]["layers"]
    assert layers == record["rmi_across"]["layers"]
    matrix = torch.tensor(record["activations"]["rmi_across"]["matrix"])
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix.diagonal(), torch.ones(len(layers)))
    itself = record["shared_initialisation"]["across_adapters"][str(TINY / "gsm8k")]
    assert len(itself) == len(record["modules"])


def test_activation_sums_are_those_of_the_outputs() -> None:
    from bslora_convert.behaviour.activations import activation_pools
    from bslora_convert.behaviour.adapter import read_adapter
    from bslora_convert.behaviour.prompts import Prompts
    from bslora_convert.behaviour.session import BaseModelSession

    session = BaseModelSession(read_adapter(TINY / "gsm8k"), str(TINY / "base"))
    prompts = Prompts.read(TINY / "gsm8k-heldout.jsonl", 3)
    pools = activation_pools(session, prompts)
    name = "model.layers.0.self_attn.q_proj"
    module = load_lora(TINY / "gsm8k").modules[name]
    seen: list[torch.Tensor] = []
    handle = session.base.model.get_submodule(name).register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0][0])
    )
    with session.reference, torch.no_grad():
        for example in session.encode(prompts).examples:
            session.base.model(input_ids=torch.tensor([example.ids]))
    handle.remove()
    factors = module.factors()
    outputs = torch.cat(seen).double() @ (factors.b.double() @ factors.a.double()).T
    assert pools[name].count == outputs.numel()
    assert pools[name].variance == pytest.approx(float(outputs.var(unbiased=False)), rel=1e-4)


def test_wrong_use_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="draws is 1"):
        analyze(TINY / "gsm8k", draws=1)
    with pytest.raises(RecipeError, match="given together"):
        analyze(TINY / "gsm8k", prompts=TINY / "gsm8k-heldout.jsonl")
    with pytest.raises(InputError, match="no such file"):
        analyze(TINY / "gsm8k", base_model="x", prompts=tmp_path / "none.jsonl")
    with pytest.raises(RecipeError, match="groups is 'auto': with transform none"):
        Recipe(transform="none", groups="auto")


def test_an_adapter_outside_of_layers_has_nothing_to_share(tmp_path: Path) -> None:
    write_lora(tmp_path / "lora", {"pooler": next(iter(random_products().values()))})
    record = analyze(tmp_path / "lora", tmp_path / "out", draws=2)
    assert "nothing to share" in record["recommendation"][-1]
    assert (tmp_path / "out" / "analysis.html").is_file()


# ---------------------------------------------------------------------------------------------------- groups


def test_a_file_of_groups_is_matched_in_order(tmp_path: Path) -> None:
    names = [f"model.layers.{layer}.{kind}" for layer in range(2) for kind in KINDS]
    found = match({"attention": ["*.self_attn.*"], "first": ["model.layers.0.*"]}, names)
    assert len(found["attention"]) == 8
    assert found["first"] == [f"model.layers.0.mlp.{kind}" for kind in ("gate_proj", "up_proj", "down_proj")]
    path = tmp_path / "groups.json"
    for content, words in (
        ("[1]", "an object of groups"), ('{"g": "x"}', "an object of groups"), ("{", "not valid JSON"),
        ('{"g": ["nothing.*"]}', "no pattern matches"),
    ):  # fmt: skip
        path.write_text(content)
        with pytest.raises(InputError, match=words):
            read_groups(path, names)
    with pytest.raises(InputError, match="no such file"):
        read_groups(tmp_path / "none.json", names)


def test_auto_finds_planted_groups_and_earns_its_place(tmp_path: Path) -> None:
    kinds = {kind: KINDS[kind] for kind in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")}
    source = write_lora(tmp_path / "lora", two_families(layers=2, kinds=kinds))
    by = {}
    for groups in ("layer", "auto"):
        recipe = Recipe(transform="ke", ranks=(1, 6, 1), groups=groups, shared_size=32)
        by[groups] = compress(source, tmp_path / groups, recipe, report_html=False)
    sizes = {name: record["compact"]["parameters"] for name, record in by.items()}
    assert all(record["weight"]["relative_error"] < 1e-3 for record in by.values())
    assert sizes["layer"] - sizes["auto"] == 2 * 2 * 6 * 32  # four layers' pairs against two clusters'
    budget = by["auto"]["compact"]["parameter_ratio"]
    recipe = Recipe(transform="ke", budget=budget, shared_size=32)
    layers = compress(source, tmp_path / "layers in as much", recipe, report_html=False)
    assert layers["weight"]["relative_error"] > 0.05
    assert any("clusters of layers" in note and "kept" in note for note in by["auto"]["notes"])
    form = load_compact(tmp_path / "auto").form
    assert set(form.shared["intra"]) == {"layers-0", "layers-1"}


def test_a_grouped_adapter_runs_in_peft(tmp_path: Path) -> None:
    """A module without a group shares on the other level only; the owner of a group is its first module, whatever its layer."""
    kinds = {kind: shape for kind, shape in KINDS.items() if kind != "self_attn.k_proj"}
    source = write_lora(tmp_path / "lora", random_products(layers=3, kinds=kinds))
    (tmp_path / "groups.json").write_text('{"up": ["*.up_proj"], "attention": ["*.[1-2].self_attn.*"]}')
    recipe = Recipe(transform="ke", ranks=(2, 2, 2), groups=str(tmp_path / "groups.json"), shared_size=32)
    record = compress(source, tmp_path / "out", recipe, report_html=False)
    assert record["recipe"]["groups"].endswith("groups.json")
    form = load_compact(tmp_path / "out").form
    assert set(form.shared["intra"]) == {"up", "attention"}
    assert "intra" not in form.modules["model.layers.0.self_attn.q_proj"].paths
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = PeftModel.from_pretrained(LlamaForCausalLM(config), str(tmp_path / "out"))
    for name in form.modules:
        layer = model.get_submodule(f"base_model.model.{name}")
        delta = form.delta(name)
        torch.testing.assert_close(layer.get_delta_weight("default"), delta.b @ delta.a, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert load_compact(tmp_path / "again").form.parameters == form.parameters
