"""`adapter_config.json` of a compact directory as PEFT reads it."""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from dataclasses import fields as fields_of
from functools import lru_cache
from pathlib import Path, PurePosixPath
from sys import intern
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from bslora_convert.bslora.codes.composed import from_file
from bslora_convert.bslora.codes.file import NAMES
from bslora_convert.bslora.common import carry, found_from, named_in, read_common
from bslora_convert.bslora.form import PARTS
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.resident import RESIDENT
from bslora_convert.bslora.storage import (
    CONFIG_NAME,
    FORMAT_VERSION,
    PEFT_TYPE,
    PREFIX,
    WEIGHTS_NAME,
    changed,
    check_version,
    decoded_dtype,
)
from bslora_convert.errors import InputError, RecipeError
from bslora_convert.files.integrity import CHANGED, integrity
from bslora_convert.files.tensorfile import sign
from bslora_convert.peft.fresh import DEFAULT_RANKS, DEFAULT_TARGETS, SCALING, Fresh, fields
from bslora_convert.peft.initial import Init
from bslora_convert.recipe.checks import check_choice, is_number
from bslora_convert.recipe.training import TRAINED

PAIR_B = re.compile(rf"\.bslora_(?:{'|'.join(PARTS)})_B(?:\.|$)")  # a file's key, or a model's with the adapter's name
LIVE = ("resident", "decoded_bytes", "scaling", "init")  # of an adapter on a model

CHOOSING = (
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)  # PEFT's, beside target_modules


@dataclass
class BsloraConfig(PeftConfig):
    """Configuration of one compact adapter.

    transform, shared, modules: the layout, see `docs/format.md`; every tensor's shape follows from it. Of an adapter that is
    held as codes modules have the file's names, as it is saved as it came.
    dtype: what the tensors are stored in; weights that are still exact in it are saved in it again.
    coding: how the file's numbers are coded; None once they are held as floats, as they are saved again as floats.
    train: which parts get gradients when the adapter is trainable: `local`, `shared` (pairs, kernels and gates) or `all`.
    resident: what an adapter that comes in codes is held as on a model: `codes`, decoded when it is used, or `floats`, as one
    that is trained always is. decoded_bytes: how much may be decoded at a time of all the adapters on the model; where None
    what was said before, at first a GiB.
    scaling: of every part while the adapter is on a model, where files have none: B is multiplied by it as it is saved and
    divided by it as it is loaded, which a power of two does exactly. init: how a new adapter is drawn; None leaves it at zero, as
    one is that will be loaded. None of resident, decoded_bytes, scaling and init is saved. drawn: the seed and the places of
    local A's that are its draws (`Init`).
    """

    format_version: int = FORMAT_VERSION
    coding: dict[str, Any] | None = None
    initialisation: dict[str, Any] | None = None
    drawn: dict[str, Any] | None = None
    dtype: str = "float32"
    transform: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    train: str = "all"
    resident: str = "codes"
    decoded_bytes: int | None = None
    scaling: float = 1.0
    init: Init | None = None
    target_modules: list[str] | set[str] | str | None = None
    fan_in_fan_out: bool = False
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    ensure_weight_tying: bool = False
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        """Checks what a wrong file would get wrong later.

        :raises InputError: for an unknown format or a broken layout. :raises RecipeError: for a wrong value of `train`,
            `resident` or `scaling`.
        """
        super().__post_init__()  # type: ignore[no-untyped-call]
        from peft.utils.peft_types import PeftType

        self.peft_type = PeftType[PEFT_TYPE]
        check_version({"format_version": self.format_version, "coding": self.coding}, CONFIG_NAME)
        check_choice("train", self.train, TRAINED)
        check_choice("resident", self.resident, RESIDENT)
        if not (is_number(self.scaling) and self.scaling > 0):
            raise RecipeError(f"scaling is {self.scaling!r}: a number above zero is allowed", "scaling")
        if self.coding is not None:
            self.modules = {intern(name): _module(json.dumps(module)) for name, module in self.modules.items()}
        self._stored = self._layout = self._parsed()  # as the file has it, and in the model's names
        if isinstance(self.target_modules, list):
            self.target_modules = {intern(name) for name in self.target_modules}
        self._renamed: dict[str, str] = {}
        self.common: Path | None = None  # the file that the codes are against
        self.layers: frozenset[str] = frozenset()  # of the model, those that it changes
        self.target_modules_to_tie: list[str] = []
        self.modules_to_tie: list[str] | None = None

    @classmethod
    def new(
        cls,
        model: nn.Module,
        transform: str = "ke",
        ranks: Sequence[int] | str = DEFAULT_RANKS,
        target_modules: Sequence[str] | str = DEFAULT_TARGETS,
        *,
        init: Init | str = "kaiming_normal",
        scaling: float = SCALING,
        **options: Any,
    ) -> "BsloraConfig":
        """The configuration of an adapter that is to be trained on a model, for `get_peft_model` and trainers.

        model: what it will be put on; nothing but names and sizes is read, so it may be on the meta device.
        transform, ranks, and of the options shared_size, kernel, slice and groups: as of `Fresh`. target_modules (`all-linear`
        too), and of the options exclude_modules, layers_to_transform, layers_pattern and modules_to_save: as of PEFT's
        `LoraConfig`. init: how kernels and gates are drawn, or an `Init`. The options may name any other field.

        :raises RecipeError: naming the field, its value and what is allowed. :raises InputError: when the model has no such
            modules.
        """
        own = {one.name: options.pop(one.name) for one in fields_of(Fresh) if one.name in options}
        form = Fresh(transform, ranks, **own)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        chosen = {name: options.pop(name, None) for name in CHOOSING}
        found = fields(form, base, target_modules, chosen)
        given = {"modules_to_save": chosen["modules_to_save"], "scaling": scaling, "init": Init.of(init), **options}
        config = cls(**{**found, **given})
        if config.init is not None:
            config.init = config.init.placed(config.layout())
            config.drawn = config.init.record
        return config

    @property
    def stays_coded(self) -> bool:
        """Whether the adapter is held as codes: it comes in codes, is not to be trained, and nothing else was asked for."""
        return self.coding is not None and self.resident == "codes" and self.inference_mode

    @property
    def stored_dtype(self) -> torch.dtype:
        """What codes are decoded to.

        :raises InputError: when that is no float type.
        """
        return decoded_dtype({"dtype": self.dtype}, CONFIG_NAME)

    def rename(self, names: Mapping[str, str]) -> None:
        """Takes over what a model calls the modules, in which names the adapter is put on it and saved again as floats."""
        if self.stays_coded:
            self._layout = (
                self._stored.renamed(names) if any(old != new for old, new in names.items()) else self._stored
            )
            return
        before = self._layout
        self.modules = before.renamed(names).to_config()["modules"]
        self._layout = after = self._parsed()
        moved = {
            f"{name}.bslora_{tensor}": f"{names[name]}.bslora_{tensor}"
            for name in before.modules
            for tensor in before.held_by(name)
        }
        for (level, group), owner in before.owners.items():  # another name may stand first in the group's order
            for side in "AB":
                tensor = f"bslora_{level}_{side}"
                moved[f"{owner}.{tensor}"] = f"{after.owners[level, group]}.{tensor}"
        self._renamed = {old: new for old, new in moved.items() if old != new}

    def layout(self) -> Layout:
        """The layout in the model's names."""
        return self._layout

    @property
    def stored(self) -> Layout:
        """The layout as the file has it."""
        return self._stored

    def _parsed(self) -> Layout:
        """The layout that the fields describe."""
        return Layout.parse(
            {
                "initialisation": self.initialisation,
                "transform": self.transform,
                "shared": self.shared,
                "modules": self.modules,
            },
            CONFIG_NAME,
        )

    def to_dict(self) -> dict[str, Any]:
        """What is saved."""
        fields: dict[str, Any] = super().to_dict()
        return {name: value for name, value in fields.items() if name not in LIVE}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """The configuration of a directory.

        accept_changed: takes weights that are not what was written and measured any more.

        :raises InputError: for such weights without it.
        """
        accept_changed = kwargs.pop("accept_changed", False)
        directory = Path(pretrained_model_name_or_path, subfolder or "")
        weights = directory / WEIGHTS_NAME
        if not accept_changed and weights.is_file() and integrity(directory, weights) == CHANGED:
            raise InputError(changed(directory))
        found = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        name = named_in(found.to_dict())
        if isinstance(found, BsloraConfig) and name is not None:
            if not directory.is_dir():
                downloading = cls._split_kwargs(kwargs)[0]  # type: ignore[no-untyped-call]
                directory = _downloaded(str(pretrained_model_name_or_path), subfolder or "", name, downloading).parent
            found.common = found_from(directory, name)
            read_common(found.common)
        return found

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Writes the configuration, and the file that the codes are against, if they are against one, beside it.

        Weights that PEFT wrote there before get a checksum in their header.

        :raises InputError: when that file is gone or damaged. :raises OutputError: when it can't be written.
        """
        super().save_pretrained(save_directory, **kwargs)
        weights = Path(save_directory) / WEIGHTS_NAME
        if weights.is_file():
            sign(weights)
        name = named_in(self.to_dict())
        if self.common is not None and name is not None:
            carry(name, self.common.parent, Path(save_directory), inside=True)

    def put_together(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors as the model holds them: decoded, in the model's names, scaling taken out.

        :raises InputError: when codes are damaged.
        """
        whole = scaled(self._decoded(tensors), 1 / self.scaling)
        moved = {PREFIX + old: PREFIX + new for old, new in self._renamed.items()}
        self._renamed, self._stored = {}, self._layout
        return {moved.get(key, key): tensor for key, tensor in whole.items()}

    def _decoded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's tensors as floats.

        :raises InputError: when codes are damaged.
        """
        if self.coding is None:
            return dict(tensors)
        codes, rest = split(tensors)
        decoded = from_file(codes, self._stored, self.stored_dtype, WEIGHTS_NAME)
        self.coding = self.initialisation = None
        self.modules = {n: {k: v for k, v in module.items() if k != "initial"} for n, module in self.modules.items()}
        return rest | {PREFIX + key: tensor for key, tensor in decoded.items()}


def _downloaded(repo: str, subfolder: str, name: str, options: Mapping[str, Any]) -> Path:
    """A file that lies beside or above an adapter on the Hub, downloaded as PEFT downloads the adapter.

    :raises InputError: when it is not there.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    for place in (PurePosixPath(subfolder), *PurePosixPath(subfolder).parents):
        with suppress(EntryNotFoundError):
            return Path(hf_hub_download(repo, name, subfolder=str(place).strip("."), **options))
    raise InputError(f"{repo}: the adapter's codes are against {name}, which is not beside it or above")


def scaled(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Tensors by key, every B times a factor: so every part of the update is, and nothing else."""
    return {key: tensor * factor if factor != 1 and PAIR_B.search(key) else tensor for key, tensor in tensors.items()}


def split(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The code tensors of a file by name, and the others by key."""
    codes = {name: tensors[PREFIX + name] for name in NAMES if PREFIX + name in tensors}
    return codes, {key: tensor for key, tensor in tensors.items() if key.removeprefix(PREFIX) not in codes}


@lru_cache(1 << 12)
def _module(text: str) -> dict[str, Any]:
    """One object for all modules that are alike, in a thousand adapters on one model; nobody changes it."""
    found: dict[str, Any] = json.loads(text)
    return found
