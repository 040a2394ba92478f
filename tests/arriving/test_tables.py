"""Saved embeddings and heads: each there once, loaded by PEFT as before, and what they take is said."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bslora_convert import Recipe, compress, expand, load_lora
from bslora_convert.errors import InputError
from tests.arriving.making import adapted, answers, apart, base, loaded
from tests.planting import random_products, write_lora

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
SAVED = ["embed_tokens", "lm_head"]
EXACT = Recipe(transform="none", budget=1.0, dtype="float32")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved embedding and head on a vocabulary that was resized, as PEFT saves them."""
    place = tmp_path_factory.mktemp("tables") / "lora"
    return adapted(place, "qwen3", 70, target_modules=["q_proj", "v_proj"], modules_to_save=SAVED)


def thrice(place: Path, **changes: Tensor) -> Path:
    """Each table three times, as PEFT saves them where it can look the base up."""
    numbers = torch.Generator().manual_seed(0)
    extra = {}
    for name in ("model.embed_tokens", "lm_head"):
        own, other = (torch.randn(90, 64, generator=numbers) for _ in range(2))
        extra |= {
            f"{name}.weight": own,
            f"{name}.modules_to_save.weight": own.clone(),
            f"{name}.original_module.weight": other,
        }
    extra = {PREFIX + name: tensor for name, tensor in (extra | changes).items()}
    return write_lora(place, random_products(layers=1), extra=extra, modules_to_save=SAVED)


def test_peft_does_the_same_with_what_was_left(saved: Path, tmp_path: Path) -> None:
    wanted = answers(loaded(saved, "qwen3", 70))
    assert apart(answers(base("qwen3", 70)), wanted) > 0.1
    compress(saved, tmp_path / "compact", EXACT, report_html=False)
    assert apart(answers(loaded(tmp_path / "compact", "qwen3", 70)), wanted) < 1e-5
    assert apart(answers(loaded(tmp_path / "compact", "qwen3", 70).merge_and_unload()), wanted) < 1e-5
    expand(tmp_path / "compact", tmp_path / "lora")
    assert apart(answers(loaded(tmp_path / "lora", "qwen3", 70)), wanted) < 1e-5


def test_one_copy_is_kept_and_the_bases_left(tmp_path: Path) -> None:
    lora = thrice(tmp_path / "lora")
    adapter = load_lora(lora)
    assert set(adapter.carried) == {"model.embed_tokens.weight", "lm_head.weight"}
    (note,) = adapter.notes
    assert "left out, 92,160 bytes: second copies" in note and "lm_head.original_module.weight" in note
    record = compress(lora, tmp_path / "out", Recipe(transform="none", bytes=0.25), report_html=False)
    assert record["compact"]["byte_ratio"] < 0.45
    (said,) = (note for note in record["notes"] if "whole weights" in note)
    assert "46,080 bytes in float32" in said and "--bytes is a share of the rest" in said
    factors = sum(module.a.nbytes + module.b.nbytes for module in adapter.modules.values())
    assert 0.9 * (0.25 * factors) < record["compact"]["bytes"] - 46_080 <= 0.25 * factors


def test_only_a_wrapped_copy_gets_its_own_name(tmp_path: Path) -> None:
    lora = thrice(tmp_path / "lora")
    tensors = load_file(lora / WEIGHTS)
    del tensors[f"{PREFIX}lm_head.weight"]
    save_file(tensors, lora / WEIGHTS)
    kept = load_lora(lora).carried
    assert torch.equal(kept["lm_head.weight"], tensors[f"{PREFIX}lm_head.modules_to_save.weight"])


def test_copies_that_differ_are_refused(tmp_path: Path) -> None:
    lora = thrice(tmp_path / "lora", **{"lm_head.modules_to_save.weight": torch.zeros(90, 64)})
    with pytest.raises(InputError, match=r"lm_head\.weight and lm_head\.modules_to_save\.weight .* differ"):
        load_lora(lora)


def test_tables_in_a_smaller_type(tmp_path: Path) -> None:
    lora = thrice(tmp_path / "lora")
    record = compress(lora, tmp_path / "out", Recipe(transform="none", bytes=0.5, tables="bfloat16"), report_html=False)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert {tensors[f"{PREFIX}{name}.weight"].dtype for name in ("model.embed_tokens", "lm_head")} == {torch.bfloat16}
    (note,) = (note for note in record["notes"] if "stored in bfloat16" in note)
    assert float(note.rpartition(" ")[2]) < 0.003
    huge = {name: torch.full((9, 64), 1e9) for name in ("lm_head.weight", "lm_head.modules_to_save.weight")}
    large = thrice(tmp_path / "large", **huge)
    with pytest.raises(InputError, match="float16 can't hold"):
        compress(large, tmp_path / "never", Recipe(transform="none", bytes=0.5, tables="float16"), report_html=False)


def on_base(place: Path, family: str, rows: tuple[int, ...], saved: list[str], whole: str = "") -> tuple[Path, Path]:
    """A base on disk, and an adapter with tables saved whole of which only some rows are not the base's; of `whole` none is."""
    model = base(family).float()
    model.save_pretrained(place / "base")
    lora = adapted(place / "lora", family, target_modules=["q_proj", "v_proj"], modules_to_save=saved)
    tensors, numbers = load_file(lora / WEIGHTS), torch.Generator().manual_seed(1)
    for name in saved:
        (key,) = (key for key in tensors if key.endswith(f"{name}.weight"))
        table = (model.lm_head if name == "lm_head" else model.model.embed_tokens).weight.detach().clone()
        table[list(rows)] += torch.randn(len(rows), table.shape[1], generator=numbers)
        tensors[key] = table if name != whole else torch.randn(table.shape, generator=numbers)
        numbers.manual_seed(1)  # the same in each
    save_file(tensors, lora / WEIGHTS)
    return lora, place / "base"


CHANGED = (3, 5, 60)
CASES = {  # family, saved, of which all rows changed; what is kept: names of rows, of whole tables
    "alone": ("llama", ["embed_tokens"], "", ["model.embed_tokens"], []),
    "both": ("llama", ["embed_tokens", "lm_head"], "", ["model.embed_tokens", "lm_head"], []),
    "one of both": ("llama", ["embed_tokens", "lm_head"], "lm_head", ["model.embed_tokens"], ["lm_head"]),
    "tied": ("qwen3", ["embed_tokens", "lm_head"], "", ["model.embed_tokens"], []),
    "tied, the embedding alone": ("qwen3", ["embed_tokens"], "", [], ["model.embed_tokens"]),
    "tied, of two minds": ("qwen3", ["embed_tokens", "lm_head"], "lm_head", [], ["lm_head", "model.embed_tokens"]),
}


@pytest.mark.parametrize("case", CASES)
def test_rows_that_are_the_bases_are_left_out(case: str, tmp_path: Path) -> None:
    family, saved, whole, rows, tables = CASES[case]
    lora, directory = on_base(tmp_path, family, CHANGED, saved, whole)
    wanted = answers(loaded(lora, family))
    record = compress(lora, tmp_path / "out", EXACT.but(base_model=str(directory)), report_html=False)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    kept = {name.removeprefix(PREFIX) for name in tensors if "lora" not in name}
    assert kept == {f"{name}.token_adapter.trainable_tokens_delta" for name in rows} | {
        f"{name}.weight" for name in tables
    }
    assert all(len(tensors[PREFIX + name]) == len(CHANGED) for name in kept if name.endswith("_delta"))
    said = [note for note in record["notes"] if "3 of its 64 rows" in note or "kept whole" in note]
    assert len(said) == len(rows) + len(tables)
    assert apart(answers(base(family)), wanted) > 0.1
    assert apart(answers(loaded(tmp_path / "out", family)), wanted) < 1e-5
    expand(tmp_path / "out", tmp_path / "back")
    assert apart(answers(loaded(tmp_path / "back", family)), wanted) < 1e-5


def test_rows_beyond_the_bases_vocabulary_are_the_adapters(tmp_path: Path) -> None:
    base("llama").float().save_pretrained(tmp_path / "base")
    lora = adapted(
        tmp_path / "lora", "llama", 70, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    tensors = load_file(lora / WEIGHTS)
    for name, own in (("model.embed_tokens", "model.embed_tokens"), ("lm_head", "lm_head")):
        tensors[f"{PREFIX}{name}.weight"][:64] = base("llama").float().get_submodule(own).weight.detach()
    save_file(tensors, lora / WEIGHTS)
    compress(lora, tmp_path / "out", EXACT.but(base_model=str(tmp_path / "base")), report_html=False)
    assert len(load_file(tmp_path / "out" / WEIGHTS)[f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta"]) == 6
    wanted = answers(loaded(lora, "llama", 70))
    assert apart(answers(loaded(tmp_path / "out", "llama", 70)), wanted) < 1e-5


def test_a_base_model_that_nothing_needs_is_said(saved: Path, tmp_path: Path) -> None:
    lora, directory = on_base(tmp_path, "llama", CHANGED, [])
    record = compress(lora, tmp_path / "out", EXACT.but(base_model=str(directory)), report_html=False)
    assert any("was not used: no prompts, and no saved tables" in note for note in record["notes"])
    other = compress(saved, tmp_path / "other", EXACT.but(base_model=str(directory)), report_html=False)
    assert len([note for note in other["notes"] if "is kept whole" in note]) == 2


def test_a_head_with_a_bias_is_kept_whole(tmp_path: Path) -> None:
    lora, directory = on_base(tmp_path, "llama", CHANGED, ["lm_head"])
    tensors = load_file(lora / WEIGHTS)
    save_file({**tensors, f"{PREFIX}lm_head.bias": torch.zeros(64)}, lora / WEIGHTS)
    compress(lora, tmp_path / "out", EXACT.but(base_model=str(directory)), report_html=False)
    kept = load_file(tmp_path / "out" / WEIGHTS)
    assert f"{PREFIX}lm_head.weight" in kept and f"{PREFIX}lm_head.bias" in kept
    assert not any("trainable_tokens" in name for name in kept)
