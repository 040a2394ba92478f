"""`--format gguf` in llama.cpp itself: the tokens and log-probabilities of transformers, in every architecture and dtype."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from click.testing import CliRunner
from peft import PeftModel
from torch import nn

from bslora_convert import Recipe, compress, expand, load_compact
from bslora_convert.bslora.form import BsloraForm, Module
from bslora_convert.bslora.storage import save_compact
from bslora_convert.cli import main
from bslora_convert.errors import InputError, Refused
from bslora_convert.modules.factors import Factors
from bslora_convert.serving.gguf import ARCHITECTURES, GGUF_NAME, read_base
from bslora_convert.serving.gguf.models import Architecture, Base
from tests.conftest import FIXTURES, REAL_ADAPTER
from tests.serving.bases import write_base
from tests.serving.llama import PROMPTS, TOKENS, answers, difference

pytest.importorskip("xllamacpp")

TINY = FIXTURES / "tiny"
EVERY = TOKENS * len(PROMPTS)
CLOSE = 5e-4  # nats: twice what llama.cpp differs by without any adapter, where its GELU is a table
SMALL: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {"head_dim": 16},
    "GemmaForCausalLM": {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh"},
    "Gemma2ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "Gemma3ForCausalLM": {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 64},
    "MistralForCausalLM": {"sliding_window": None},
}  # fmt: skip


@dataclass
class Made:
    """A base model in both forms, and a compact adapter for it."""

    model: Any
    directory: Path
    gguf: Path
    compact: Path


def made(place: Path, architecture: str) -> Made:
    """A random model of two layers, and an adapter of ranks 1 to 5 on every linear layer of it."""
    torch.manual_seed(0)
    config = getattr(transformers, architecture.replace("ForCausalLM", "Config"))
    if architecture.startswith("Gemma3"):
        config = transformers.Gemma3TextConfig
    model = getattr(transformers, architecture)(
        config(**SMALL, **OWN.get(architecture, {}), attn_implementation="eager")
    )
    model.eval()
    with torch.no_grad():  # larger than an initialisation's, so that what is wrong is seen
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4 if "embed" not in name else 2)
    model.save_pretrained(place / "base")
    modules = {}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n]
    for number, (name, layer) in enumerate(layers):
        out, width, rank = layer.out_features, layer.in_features, 1 + number % 5
        pair = Factors(torch.randn(out, rank) * 0.3 / rank**0.5, torch.randn(rank, width) * 0.3)
        modules[name] = Module((out, width), pair)
    (place / "compact").mkdir()
    save_compact(BsloraForm(None, modules), place / "compact", {"base_model_name_or_path": "base"}, {})
    return Made(model, place / "base", write_base(model, place / "base", place / "base.gguf"), place / "compact")


def adapted(made: Made) -> nn.Module:
    """The model with the form's updates in its weights."""
    form = load_compact(made.compact).form
    with torch.no_grad():
        for name in form.modules:
            delta = form.delta(name)
            made.model.get_submodule(name).weight += delta.b @ delta.a
    return made.model


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_in_llama_cpp(tmp_path: Path, architecture: str) -> None:
    here = made(tmp_path, architecture)
    assert difference(here.model, answers(here.gguf)).largest < CLOSE
    record = expand(here.compact, tmp_path / "out", engine="llama.cpp", base_model=str(here.directory), dtype="f32")
    assert record["relative_error"] < 1e-6
    assert record["architecture"] == ARCHITECTURES[architecture].name
    said = answers(here.gguf, tmp_path / "out" / GGUF_NAME)
    assert difference(here.model, said).largest > 0.1  # it does something
    found = difference(adapted(here), said)
    assert (found.equal, found.largest < CLOSE) == (EVERY, True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The trained tiny base, with a compact adapter of its own."""
    place = tmp_path_factory.mktemp("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32).eval()
    compress(
        TINY / "gsm8k",
        place / "compact",
        Recipe(transform="ke", budget=0.6, dtype="float32", shared_size=32),
        report_html=False,
    )
    return Made(model, TINY / "base", write_base(model, TINY / "base", place / "base.gguf"), place / "compact")


@pytest.mark.parametrize(
    ("dtype", "limit", "kinds"),
    [
        ("f32", CLOSE, {"F32"}),
        ("bf16", 0.05, {"BF16"}),
        ("f16", 0.01, {"F16"}),
        ("q8_0", 0.05, {"Q8_0", "F16"}),
        ("auto", CLOSE, {"F32"}),
    ],
)
def test_every_dtype_against_real_peft(llama: Made, tmp_path: Path, dtype: str, limit: float, kinds: set[str]) -> None:
    expand(llama.compact, tmp_path / "lora", dtype="float32")
    expand(llama.compact, tmp_path / "out", format="gguf", base_model=str(llama.directory), dtype=dtype)
    path = tmp_path / "out" / GGUF_NAME
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors} == kinds
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.directory, dtype=torch.float32).eval()
    with_peft = PeftModel.from_pretrained(model, str(tmp_path / "lora"))
    found = difference(with_peft, answers(llama.gguf, path))
    assert found.largest < limit
    assert found.equal == EVERY or kinds != {"F32"}


def test_without_the_order_of_the_rows_it_would_be_wrong(llama: Made, tmp_path: Path, monkeypatch: Any) -> None:
    expand(llama.compact, tmp_path / "lora", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(llama.directory, dtype=torch.float32).eval()
    with_peft = PeftModel.from_pretrained(model, str(tmp_path / "lora"))
    monkeypatch.setitem(ARCHITECTURES, "LlamaForCausalLM", Architecture("llama", turned=False))
    expand(llama.compact, tmp_path / "out", format="gguf", base_model=str(llama.directory))
    assert difference(with_peft, answers(llama.gguf, tmp_path / "out" / GGUF_NAME)).largest > 0.05


@pytest.mark.slow
@pytest.mark.real_base
def test_the_real_adapter_on_its_real_base(smollm2: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    base = write_base(model, smollm2, tmp_path / "base.gguf")
    compress(REAL_ADAPTER, tmp_path / "compact", Recipe(transform="none", bytes=0.125), report_html=False)
    expand(tmp_path / "compact", tmp_path / "lora", dtype="float32")
    expand(tmp_path / "compact", tmp_path / "out", engine="llama.cpp", base_model=str(smollm2), dtype="q8_0")
    with_peft = PeftModel.from_pretrained(model, str(tmp_path / "lora"))
    assert difference(with_peft, answers(base, tmp_path / "out" / GGUF_NAME)).largest < 0.05


def test_the_file_says_alpha_0_and_no_more_than_it_has_to(llama: Made, tmp_path: Path) -> None:
    for name in ("one", "two"):
        expand(llama.compact, tmp_path / name, format="gguf", base_model=str(llama.directory), dtype="q8_0")
    assert (tmp_path / "one" / GGUF_NAME).read_bytes() == (tmp_path / "two" / GGUF_NAME).read_bytes()
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["README.md", "adapter.gguf", "expansion.json"]
    reader = gguf.GGUFReader(tmp_path / "one" / GGUF_NAME)
    said = {name: reader.fields[name].contents() for name in reader.fields if not name.startswith("GGUF.")}
    assert said["general.type"] == "adapter"
    assert said["general.architecture"] == "llama"
    assert said["adapter.type"] == "lora"
    assert said["adapter.lora.alpha"] == 0
    form = load_compact(llama.compact).form
    shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}
    assert len(shapes) == 2 * len(form.modules)
    rank = form.expanded_rank("model.layers.0.mlp.down_proj")
    out, width = form.modules["model.layers.0.mlp.down_proj"].shape
    assert shapes["blk.0.ffn_down.weight.lora_a"] == (width, rank)
    assert shapes["blk.0.ffn_down.weight.lora_b"] == (rank, out)


def test_pairs_of_rows_lie_side_by_side() -> None:
    base = Base(ARCHITECTURES["LlamaForCausalLM"], 1, heads=2, key_heads=1, tied=False)
    b = torch.arange(12.0)[:, None]
    assert base.turned("a.q_proj", b).flatten().tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert base.turned("a.k_proj", b).flatten().tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]
    for name in ("a.q_proj", "a.k_proj", "a.v_proj"):
        assert torch.equal(base.unturned(name, base.turned(name, b)), b)
    assert torch.equal(base.turned("a.v_proj", b), b)
    with pytest.raises(Refused, match="can't share in pairs"):
        base.turned("a.q_proj", b[:10])


def form_of(place: Path, name: str, scale: float = 1.0, kind: str = "linear") -> Path:
    place.mkdir()
    module = Module((64, 64), Factors(torch.full((64, 2), scale), torch.ones(2, 64)), {}, kind)
    save_compact(BsloraForm(None, {name: module}), place, {}, {})
    return place


def test_what_it_can_not_hold_is_refused_by_name(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()

    def configured(**config: Any) -> None:
        usual = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "num_attention_heads": 4}
        (base / "config.json").write_text(json.dumps(usual | config))

    def refused(source: Path, words: str, **options: Any) -> None:
        with pytest.raises((Refused, InputError), match=words):
            expand(source, tmp_path / "out", format="gguf", base_model=str(base), **options)
        assert not (tmp_path / "out").exists()

    good = form_of(tmp_path / "good", "model.layers.0.self_attn.q_proj")
    configured(architectures=["MixtralForCausalLM"])
    refused(good, "MixtralForCausalLM.*is known of LlamaForCausalLM")
    configured(architectures=None)
    refused(good, "architectures is None")
    configured(num_attention_heads="4")
    refused(good, "num_attention_heads is '4'")
    configured(tie_word_embeddings=True)
    refused(form_of(tmp_path / "head", "lm_head"), "head is its embedding")
    refused(form_of(tmp_path / "deep", "model.layers.2.self_attn.q_proj"), "has no such module")
    refused(form_of(tmp_path / "other", "transformer.h.0.attn.c_attn"), "has no such module")
    refused(form_of(tmp_path / "table", "model.embed_tokens", kind="embedding"), "is an embedding")
    refused(
        form_of(tmp_path / "large", "model.layers.0.mlp.up_proj", scale=1e5), "more than float16 holds", dtype="f16"
    )
    configured(num_attention_heads=3)
    refused(good, "can't share in pairs")
    (base / "config.json").unlink()
    refused(good, "no such file")
    done = CliRunner().invoke(main, ["expand", str(good), str(tmp_path / "out"), "--for", "llama.cpp"])
    assert done.exit_code == 2
    assert "--format gguf needs --base-model" in done.stderr


def test_the_base_is_what_its_configuration_says() -> None:
    base = read_base(TINY / "base")
    config = json.loads((TINY / "base" / "config.json").read_text())
    assert (base.layers, base.heads, base.key_heads) == (
        config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"],
    )  # fmt: skip
