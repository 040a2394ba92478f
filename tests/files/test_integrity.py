"""Weights that are not what was written and measured any more are noticed by every reader, and taken only knowingly."""

import json
import random
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from bslora_convert import Recipe, compress, expand, finetune, inspect, load_compact, verify
from bslora_convert.bslora.storage import WEIGHTS_NAME
from bslora_convert.cli import main
from bslora_convert.errors import InputError
from bslora_convert.files.hashing import sha256
from bslora_convert.files.integrity import AS_WRITTEN, CHANGED, CHECKED, NO_RECORD
from tests.conftest import FIXTURES

TINY = FIXTURES / "tiny"
BASE, LORA, PROMPTS = TINY / "base", TINY / "gsm8k", TINY / "gsm8k-heldout.jsonl"


@pytest.fixture(params=[Recipe(transform="ke", budget=0.5, shared_size=32), Recipe(transform="none", bytes=0.25)])
def compact(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    compress(LORA, tmp_path / "compact", request.param, report_html=False)
    return tmp_path / "compact"


def flip(path: Path, bits: int = 50) -> None:
    """Flips lowest bits in the middle of the numbers (or codes): no shape changes, nothing becomes infinite."""
    content = bytearray(path.read_bytes())
    chosen = random.Random(0).sample(range(45 * len(content) // 100, 55 * len(content) // 100, 2), bits)
    for at in chosen:
        content[at] ^= 1
    path.write_bytes(content)


def test_the_record_holds_the_hash_of_what_was_written(compact: Path) -> None:
    record = json.loads((compact / "fidelity.json").read_text())
    assert record["compact"]["sha256"] == sha256(compact / WEIGHTS_NAME)
    assert set(record["files"]) == {path.name for path in compact.iterdir()} - {"fidelity.json"}
    assert all(sha256(compact / name) == said["sha256"] for name, said in record["files"].items())
    assert load_compact(compact).integrity == AS_WRITTEN
    assert inspect(compact)["integrity"] == AS_WRITTEN


def test_flipped_bits_are_noticed_by_every_reader(compact: Path, tmp_path: Path) -> None:
    flip(compact / WEIGHTS_NAME)
    for read in (
        lambda: load_compact(compact),
        lambda: expand(compact, tmp_path / "lora"),
        lambda: verify(compact, LORA, BASE, prompts=PROMPTS, limit=1),
        lambda: finetune(compact, tmp_path / "tuned", LORA, str(BASE), PROMPTS),
    ):
        with pytest.raises(InputError, match="--accept-changed"):
            read()
    assert inspect(compact)["integrity"] == CHANGED
    assert "NOT what was written" in CliRunner().invoke(main, ["inspect", str(compact)]).stdout
    refused = CliRunner().invoke(main, ["expand", str(compact), str(tmp_path / "lora")])
    assert (refused.exit_code, (tmp_path / "lora").exists()) == (2, False)


def test_peft_notices_flipped_bits(compact: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from bslora_convert.peft import BsloraConfig

    model = AutoModelForCausalLM.from_pretrained(BASE)
    flip(compact / WEIGHTS_NAME)
    with pytest.raises(InputError, match="accept_changed=True"):
        PeftModel.from_pretrained(model, compact)
    PeftModel.from_pretrained(model, compact, config=BsloraConfig.from_pretrained(compact, accept_changed=True))


def test_one_goes_on_knowingly(compact: Path, tmp_path: Path) -> None:
    flip(compact / WEIGHTS_NAME)
    taken = CliRunner().invoke(main, ["expand", str(compact), str(tmp_path / "lora"), "--accept-changed", "--json"])
    assert taken.exit_code == 0, taken.stderr
    assert "taken knowingly" in taken.stderr
    assert load_compact(compact, accept_changed=True).integrity == CHANGED


def test_without_a_record_a_reader_says_so(compact: Path, tmp_path: Path) -> None:
    (compact / "fidelity.json").unlink()
    assert inspect(compact)["integrity"] == CHECKED
    assert any("nobody knows how they were measured" in note for note in expand(compact, tmp_path / "lora")["notes"])
    whole = (compact / WEIGHTS_NAME).read_bytes()
    flip(compact / WEIGHTS_NAME)  # the header's checksum goes with the file
    with pytest.raises(InputError, match="or in its own header"):
        load_compact(compact)
    (compact / WEIGHTS_NAME).write_bytes(whole)
    save_file(load_file(compact / WEIGHTS_NAME), compact / WEIGHTS_NAME, {"format": "pt"})  # as PEFT saves it again
    assert inspect(compact)["integrity"] == NO_RECORD
    assert any(
        "can't be checked" in line for line in CliRunner().invoke(main, ["inspect", str(compact)]).stdout.split("\n")
    )
    (compact / "fidelity.json").write_text("{")
    with pytest.raises(InputError, match=r"fidelity\.json: not valid JSON"):
        load_compact(compact)
