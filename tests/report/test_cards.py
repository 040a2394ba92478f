"""Model cards: metadata that the Hub takes, the source's own carried on, and code that runs as it stands."""

import re
from pathlib import Path

import pytest
import torch
import yaml

from bslora_convert import Recipe, compress, expand
from bslora_convert.files.card import LARGEST, carried
from bslora_convert.report.metadata import front_matter, metadata
from tests.conftest import FIXTURES
from tests.planting import random_products, write_lora

TINY = FIXTURES / "tiny"
SOURCE = """---
license: apache-2.0
language:
- en
- "de"
datasets: [openai/gsm8k, 'my-org/rows']
pipeline_tag: text-generation
base_model: someone/else
tags:
  - maths
  - lora
model-index:
- name: x
  results: []
widget: {text: "hello"}
license_name: |
  many
---
# A LoRA
license: mit
"""


def fields(place: Path) -> dict[str, object]:
    text = (place / "README.md").read_text(encoding="utf-8")
    found: dict[str, object] = yaml.safe_load(text.split("---\n")[1])
    return found


def with_card(place: Path, card: str | bytes) -> Path:
    write_lora(place, random_products(layers=1, rank=4), base_model_name_or_path="my-org/my-model")
    (place / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    return place


def test_the_sources_metadata_is_carried_through_both_verbs(tmp_path: Path) -> None:
    record = compress(with_card(tmp_path / "lora", SOURCE), tmp_path / "compact", Recipe(transform="none", budget=0.9))
    expand(tmp_path / "compact", tmp_path / "again", engine="vllm")
    for place in ("compact", "again"):
        assert fields(tmp_path / place) == {
            "license": "apache-2.0", "language": ["en", "de"], "datasets": ["openai/gsm8k", "my-org/rows"],
            "library_name": "peft", "base_model": "my-org/my-model", "base_model_relation": "adapter",
            "pipeline_tag": "text-generation", "tags": ["maths", "lora", "bslora"],
        }  # fmt: skip
    assert record["source"]["card"]["license"] == "apache-2.0"


@pytest.mark.parametrize(
    "card",
    [
        "", "# no metadata\nlicense: mit\n", "---\nlicense: mit\n", b"\xff\xfe---", b"---\nlicense: \xff\n---\n",
        "---\nlicense: !!python/object:os.system\n---\n", "---\nlicense: &a mit\n---\n", "---\nlicense: 'mit\n---\n",
        "---\nlicense: " + "x" * 300 + "\n---\n", "version https://git-lfs.github.com/spec/v1\n", "---\n" + "x" * LARGEST,
        "---\nlicense: <script>\n---\n",
    ],
)  # fmt: skip
def test_what_is_no_metadata_is_left(tmp_path: Path, card: str | bytes) -> None:
    assert "license" not in carried(with_card(tmp_path / "lora", card))


def test_a_directory_for_a_card_is_none(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    assert carried(tmp_path) == {}
    assert carried(tmp_path / "nowhere") == {}


def test_what_is_known_is_said_and_a_path_is_no_model_of_the_hub(tmp_path: Path) -> None:
    compress(TINY / "gsm8k", tmp_path / "compact", Recipe(transform="none", budget=0.9))
    said = fields(tmp_path / "compact")
    assert "base_model" not in said
    assert said["pipeline_tag"] == "text-generation"
    for path in ("./base", "/models/base", "a/b/c", "base", None):
        assert "base_model" not in metadata({}, "peft", path, None, ("lora",))


@pytest.mark.parametrize(
    "value", ["no", "1.0", "a: b", "x # y", "mit", "org/name", "@x", "ключ", "-", "it's", 'say "a"', "y"]
)
def test_texts_come_back_as_they_were(value: str) -> None:
    text = front_matter({"license": value, "tags": [value, "b"]})
    assert yaml.safe_load(text.split("---\n")[1]) == {"license": value, "tags": [value, "b"]}


@pytest.mark.parametrize("place", ["compact", "again"])
def test_the_usage_block_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    lora = tmp_path / "lora"
    import json
    import shutil

    shutil.copytree(TINY / "gsm8k", lora)
    config = json.loads((lora / "adapter_config.json").read_text())
    (lora / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(TINY / "base")}))
    compress(lora, tmp_path / "compact", Recipe(transform="ke", budget=0.5, shared_size=32))
    expand(tmp_path / "compact", tmp_path / "again")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / place / "README.md").read_text(), re.S)
    assert str(tmp_path) not in code  # a base that is a path of somebody's disk is not put into a snippet
    code = code.replace('"BASE_MODEL"', repr(str(TINY / "base"))).replace("max_new_tokens=64", "max_new_tokens=4")
    monkeypatch.chdir(tmp_path / place)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    with torch.no_grad():
        assert names["model"](input_ids=torch.arange(4)[None]).logits.shape == (1, 4, 1024)  # type: ignore[operator]
