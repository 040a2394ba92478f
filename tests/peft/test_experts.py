"""Adapters of single experts, as transformers 4 names them, on models that stack their experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import PeftModel

from bslora_convert import Recipe, compress, expand, load_into, load_lora
from bslora_convert.errors import InputError
from tests.peft.routes import EXACT, logits, merges, routes, same, stays_in_codes, switches, write

pytestmark = pytest.mark.filterwarnings("ignore")
SMALL = {
    "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "num_experts_per_tok": 4,
}  # fmt: skip
ATTENTION = {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32)}
EXPERTS = 4


def mixtral() -> Any:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, intermediate_size=48, num_local_experts=EXPERTS))


def qwen2() -> Any:
    return hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **SMALL,
            intermediate_size=48,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=24,
            num_experts=EXPERTS,
        )
    )


def qwen3() -> Any:
    return hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**SMALL, intermediate_size=48, moe_intermediate_size=40, num_experts=EXPERTS, head_dim=8)
    )


# model -> how its experts are called, their projections (gate, up, down) and width
FAMILIES = {
    "mixtral": (mixtral, "block_sparse_moe.experts", ("w1", "w3", "w2"), 48, "block_sparse_moe.gate"),
    "qwen2_moe": (qwen2, "mlp.experts", ("gate_proj", "up_proj", "down_proj"), 40, "mlp.gate"),
    "qwen3_moe": (qwen3, "mlp.experts", ("gate_proj", "up_proj", "down_proj"), 40, "mlp.gate"),
}


def base(family: str) -> Any:
    torch.manual_seed(0)
    return FAMILIES[family][0]().eval()


def shapes(family: str, router: bool = False) -> dict[str, tuple[int, int]]:
    _, experts, (gate, up, down), width, gating = FAMILIES[family]
    found = {}
    for layer in range(2):
        start = f"model.layers.{layer}"
        found |= {f"{start}.{name}": shape for name, shape in ATTENTION.items()}
        for expert in range(EXPERTS):
            found |= {f"{start}.{experts}.{expert}.{name}": (width, 32) for name in (gate, up)}
            found[f"{start}.{experts}.{expert}.{down}"] = (32, width)
        if router:
            found[f"{start}.{gating}"] = (EXPERTS, 32)
    return found


def adapter(place: Path, family: str, router: bool = False, **config: Any) -> Path:
    of = shapes(family, router)
    return write(place, of, target_modules=sorted({name.rpartition(".")[2] for name in of}), **config)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_every_route_gives_the_same_model(tmp_path: Path, family: str) -> None:
    same(routes(base(family), adapter(tmp_path / "lora", family), tmp_path)[0])


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(q_proj|v_proj|w1|w2|w3)", "spelled out"])
def test_targets_said_otherwise(tmp_path: Path, targets: str) -> None:
    names = shapes("mixtral")
    said = list(names) if targets == "spelled out" else targets
    same(routes(base("mixtral"), write(tmp_path / "lora", names, target_modules=said), tmp_path)[0])


@torch.no_grad()
def by_hand(family: str, lora: Path) -> torch.Tensor:
    """Logits with every update added to the base's weights, stacked ones too."""
    _, experts, (gate, up, down), width, _ = FAMILIES[family]
    model, modules = base(family), load_lora(lora).modules
    for name, module in modules.items():
        factors = module.factors()
        delta = factors.b @ factors.a
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        if not rest.startswith(experts):
            model.get_submodule(name).weight += delta
            continue
        holder, expert, kind = model.model.layers[int(layer)].mlp.experts, int(rest.split(".")[2]), rest.split(".")[3]
        if kind == down:
            holder.down_proj[expert] += delta
        else:
            holder.gate_up_proj[expert, :width] += delta if kind == gate else 0
            holder.gate_up_proj[expert, width:] += delta if kind == up else 0
    return logits(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_compact_experts_are_put_where_they_belong(tmp_path: Path, family: str) -> None:
    """PEFT 0.21.2 leaves a LoRA's experts out on qwen2_moe, with a warning; the compact adapter is put on whole."""
    lora = adapter(tmp_path / "lora", family)
    compress(lora, tmp_path / "compact", EXACT, report_html=False)
    expected, plain = by_hand(family, lora), logits(base(family))
    model = base(family)
    with load_into(model, tmp_path / "compact"):
        attached = logits(model)
    tuned = logits(PeftModel.from_pretrained(base(family), str(tmp_path / "compact")))
    for found in (attached, tuned):
        assert float((found - expected).norm()) < 1e-4 * float((expected - plain).norm())
    stays_in_codes(lambda: base(family), lora, tmp_path / "coded")


def test_on_qwen2_moe_peft_makes_of_the_expanded_what_it_makes_of_the_source(tmp_path: Path) -> None:
    found = routes(base("qwen2_moe"), adapter(tmp_path / "lora", "qwen2_moe"), tmp_path)[0]
    same({name: found[name] for name in ("expanded", "uniform")})


@pytest.mark.parametrize("recipe", [Recipe(transform="none", budget=0.5), Recipe(transform="ke", bytes=0.2)])
@pytest.mark.parametrize("family", ["mixtral", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_ranks_that_vary(tmp_path: Path, family: str, recipe: Recipe) -> None:
    found, claimed = routes(base(family), adapter(tmp_path / "lora", family), tmp_path, recipe)
    assert 0.01 < claimed < 0.9
    assert all(distance < 5 * claimed for distance in found.values()), (found, claimed)
    assert max(found.values()) - min(found.values()) < 0.01
    modules = load_lora(tmp_path / "expanded").modules
    assert len({module.rank for name, module in modules.items() if ".experts." in name}) == 1


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_router_that_is_adapted(tmp_path: Path, family: str) -> None:
    lora = adapter(tmp_path / "lora", family, router=True)
    same(routes(base(family), lora, tmp_path / "whole")[0])
    model = PeftModel.from_pretrained(base(family), str(tmp_path / "whole" / "compact"))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(PeftModel.from_pretrained(base(family), str(tmp_path / "again"))), logits(model))
    compress(lora, tmp_path / "compact", Recipe(transform="none", budget=0.5, dtype="float32"), report_html=False)
    expand(tmp_path / "compact", tmp_path / "expanded")
    modules = load_lora(tmp_path / "expanded").modules
    largest = max(module.rank for module in modules.values())
    assert {m.rank for n, m in modules.items() if ".experts." in n or n.endswith(".gate")} == {largest}
    first, second = (
        logits(PeftModel.from_pretrained(base(family), str(tmp_path / name))) for name in ("compact", "expanded")
    )
    assert torch.allclose(first, second, atol=1e-4)


def test_compact_experts_are_merged_saved_switched_and_trained(tmp_path: Path) -> None:
    lora = adapter(tmp_path / "lora", "mixtral")
    compress(lora, tmp_path / "compact", Recipe(transform="ke", ranks=(1, 1, 1), dtype="float32"), report_html=False)
    plain = logits(base("mixtral"))
    model = PeftModel.from_pretrained(base("mixtral"), str(tmp_path / "compact"))
    expected = logits(model)
    assert float((expected - plain).norm()) > 0.01
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(base("mixtral"), str(tmp_path / "again"))
    assert torch.equal(logits(again), expected)
    switches(model, tmp_path / "again", expected, plain, 1e-5)
    with pytest.raises(ValueError, match="experts are stacked"):
        logits(model, adapter_names=["second", "second"])
    merges(model, expected, 1e-4)
    assert torch.allclose(logits(model.merge_and_unload()), expected, atol=1e-4)
    trained = PeftModel.from_pretrained(base("mixtral"), str(tmp_path / "compact"), is_trainable=True).train()
    trained(input_ids=torch.arange(3, 19).reshape(2, 8)).logits.sum().backward()
    moved = [p.grad.abs().sum() for n, p in trained.named_parameters() if ".experts." in n and "local_B" in n]
    assert len(moved) == 2 * 3 * EXPERTS
    assert sum(moved) > 0


def test_experts_of_another_model_are_named(tmp_path: Path) -> None:
    shape = {"model.layers.0.block_sparse_moe.experts.9.w1": (48, 32)}
    lora = write(tmp_path / "lora", shape, target_modules=["w1"])
    compress(lora, tmp_path / "compact", EXACT, report_html=False)
    with pytest.raises(InputError, match=r"experts\.9\.w1"):
        PeftModel.from_pretrained(base("mixtral"), str(tmp_path / "compact"))
