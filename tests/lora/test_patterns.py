"""One expression a rank, by PEFT's own matching: exactly its modules, also when their names begin differently."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from bslora_convert.lora.config import LONGEST_PATTERN, LoraConfig
from bslora_convert.lora.targets import target_fields
from bslora_convert.lora.writer import peft_config

Rename = Callable[[str], str]


def same(name: str) -> str:
    return name


def llava(name: str) -> str:
    name = name.replace("language_model.model.", "model.language_model.")
    return re.sub(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.", name).replace(
        "vision_model.encoder", "encoder"
    )


def qwen2_vl(name: str) -> str:
    return re.sub(r"^visual\.", "model.visual.", re.sub(r"^model\.layers", "model.language_model.layers", name))


def layers(start: str, kinds: tuple[str, ...], count: int = 5) -> list[str]:
    return [f"{start}.{layer}.{kind}" for layer in range(count) for kind in kinds]


ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
NAMES: dict[str, tuple[list[str], Rename]] = {
    "llama": ([*layers("model.layers", (*ATTENTION, "mlp.up_proj"), 12), "lm_head", "model.embed_tokens"], same),
    "gpt2": (layers("transformer.h", ("attn.c_attn", "attn.c_proj", "mlp.c_proj")), same),
    "t5": ([*layers("encoder.block", ("layer.0.SelfAttention.q",)), *layers("decoder.block", ("layer.0.SelfAttention.q",))],
           same),
    "bert": (layers("bert.encoder.layer", ("attention.self.query", "output.dense", "attention.output.dense")), same),
    "llava": (
        [*layers("language_model.model.layers", ATTENTION), *layers("vision_tower.vision_model.encoder.layers", ATTENTION),
         "multi_modal_projector.linear_1"], llava,
    ),
    "qwen2_vl": ([*layers("model.layers", ATTENTION), *layers("visual.blocks", ("attn.qkv", "attn.proj"))], qwen2_vl),
    "beginnings": ([*layers("layers", ("q",)), *layers("decoder.layers", ("q",)), *layers("model.decoder.layers", ("q",))], same),
    "endings": (["q_proj", "attn.q_proj", "model.attn.q_proj", "x.attn.q_proj", "other", "another"], same),
    "turned round": (["a.b.q", "b.a.q", "a.b.a.q"], same),
    "one and ten": (["layers.1.q", "layers.10.q", "layers.11.q", "x.layers.1.q"], same),
    "nested": (["layers.0.blocks.1.q", "blocks.1.q", "layers.0.q", "layers.1.blocks.1.q"], same),
    "dots": (["a.q+p", "aXq+p", "b.q+p", "q|p"], same),
}  # fmt: skip


def found(config: Mapping[str, dict[str, int]], name: str, rename: Rename) -> int:
    """The rank that PEFT takes for a module."""
    pattern = config["rank_pattern"]
    return pattern.get(get_pattern_key(pattern.keys(), rename(name)), config["r"])  # type: ignore[arg-type,return-value]


def check(ranks: Mapping[str, int], rename: Rename, place: Path) -> None:
    config = peft_config(ranks, {})
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert sorted(config["rank_pattern"].values()) == sorted(set(ranks.values()) - {config["r"]})
    assert all(len(key) <= LONGEST_PATTERN for key in config["rank_pattern"])
    for name, rank in ranks.items():
        assert found(config, name, rename) == rank, name
        assert found(config, name, same) == rank, name
        keys = [key for key in config["rank_pattern"] if re.match(rf"(.*\.)?({key})$", name)]
        assert len(keys) == (rank != config["r"])  # in whatever order they are read
    read = LoraConfig.parse(config, place)
    assert {name: read.expected_rank(name) for name in ranks} == dict(ranks)


@pytest.mark.parametrize("family", NAMES)
@pytest.mark.parametrize("step", [1, 2, 3, 7])
def test_each_rank_finds_its_modules(tmp_path: Path, family: str, step: int) -> None:
    names, rename = NAMES[family]
    check({name: 1 + (place * step) % 5 for place, name in enumerate(names)}, rename, tmp_path)


@pytest.mark.parametrize("family", NAMES)
def test_one_rank_needs_no_pattern(family: str) -> None:
    config = peft_config(dict.fromkeys(NAMES[family][0], 3), {})
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


PART = st.sampled_from(
    ["a", "b", "model", "layers", "0", "1", "10", "q", "(?:", "[q", "q|a", "a$", "^a", "\\d", "*", "{2}"]
)


@settings(max_examples=300, deadline=None)
@given(
    ranks=st.dictionaries(
        st.lists(PART, min_size=1, max_size=5).map(".".join), st.integers(1, 4), min_size=1, max_size=9
    )
)
def test_any_names(ranks: dict[str, int]) -> None:
    check(ranks, same, Path("here"))


@pytest.mark.parametrize("family", NAMES)
def test_an_expression_names_every_module_and_no_other(family: str) -> None:
    names, rename = NAMES[family]
    for chosen in (names, names[: len(names) // 2], names[1::2]):
        expression = target_fields(chosen, {})["target_modules"]
        for name in chosen:
            assert re.fullmatch(expression, name), name
            assert re.fullmatch(expression, rename(name)), name
    if family in ("llama", "gpt2", "t5", "bert", "llava", "qwen2_vl"):
        expression = target_fields(names[::2], {})["target_modules"]
        assert not [
            name for name in names[1::2] if re.fullmatch(expression, name) or re.fullmatch(expression, rename(name))
        ]
