"""An adapter of either kind as a form, so that any two of one base can be compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from torch import Tensor

from bslora_convert.bslora.form import BsloraForm, Module
from bslora_convert.bslora.storage import CONFIG_NAME, PEFT_TYPE, WEIGHTS_NAME, CompactAdapter, load_compact
from bslora_convert.errors import InputError
from bslora_convert.files.address import resolve
from bslora_convert.files.hashing import sha256
from bslora_convert.files.jsonfile import read_json
from bslora_convert.lora import LoraAdapter, load_lora
from bslora_convert.lora.tables import Rows, with_rows


@dataclass(frozen=True, slots=True)
class Adapter:
    """What runs: a form (a LoRA is one with local parts only), whole weights that travel along, and where it came from."""

    path: Path
    kind: str
    form: BsloraForm
    carried: Mapping[str, Tensor | Rows]
    base_model: str | None
    sha256: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of_lora(cls, lora: LoraAdapter, path: Path, sha256: str) -> Self:
        """A LoRA that was read, as a form of local parts only. sha256: of its weights."""
        modules = {n: Module(module.shape, module.factors(), {}, module.kind) for n, module in lora.modules.items()}
        name = lora.config.raw.get("base_model_name_or_path")
        carried = with_rows(lora.carried, lora.config.raw, path)
        return cls(path, "lora", BsloraForm(None, modules), carried, name, sha256)

    @classmethod
    def of_compact(cls, compact: CompactAdapter) -> Self:
        """A compact adapter that was read."""
        name, digest = compact.config.get("base_model_name_or_path"), sha256(compact.path / WEIGHTS_NAME)
        carried = with_rows(compact.carried, compact.config, compact.path)
        return cls(compact.path, "bslora", compact.form, carried, name, digest, compact.notes)


def read_adapter(
    path: str | Path, *, accept_changed: bool = False, alpha: float | None = None, rslora: bool | None = None
) -> Adapter:
    """Reads a compact directory, `LIBRARY::ID` or a plain LoRA directory.

    accept_changed: as for `load_compact`. alpha, rslora: as for `load_lora`.

    :raises InputError: when it is missing or damaged. :raises Refused: when it is a LoRA of a kind that can't be read faithfully.
    """
    path = resolve(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if (path / CONFIG_NAME).is_file() and read_json(path / CONFIG_NAME).get("peft_type") == PEFT_TYPE:
        return Adapter.of_compact(load_compact(path, accept_changed=accept_changed))
    lora = load_lora(path, alpha=alpha, rslora=rslora)
    return Adapter.of_lora(lora, path, sha256(lora.weights))


def check_pair(first: Adapter, second: Adapter) -> None:
    """Refuses two adapters that say they were made for different base models.

    :raises InputError: naming both.
    """
    if first.base_model and second.base_model and first.base_model != second.base_model:
        raise InputError(
            f"{first.path} was made for {first.base_model}, {second.path} for {second.base_model}: "
            "two adapters can be compared on one base model only"
        )
