"""Compact directory <-> form: two files, each shared tensor once.

`adapter_model.safetensors`, keys below `base_model.model.<module>.`:

    bslora_local_A  (r, in)      bslora_local_B  (out, r)         every module
    bslora_intra_A  (p, s_in)    bslora_intra_B  (s_out, p)       only under the module that owns the pair, the first of its group
    bslora_inter_A               bslora_inter_B
    bslora_intra_own_<name>      bslora_inter_own_<name>          kernels (A, B) or gates of each module that shares

`adapter_config.json` is a PEFT configuration with peft_type BSLORA that holds the layout: `transform`, `shared` (the rank of each
group's pair) and `modules` (shape, local rank, kind where it isn't a linear layer, groups). Every tensor's shape follows from
it, and the reader checks them all.

Where the numbers are in codes of few bits the configuration says `coding` and the tensors above are replaced by those of
`coding/file.py`; `dtype` is then what they are decoded to.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from bslora_convert.bslora.codes.coded import GROUP
from bslora_convert.bslora.codes.composed import from_file, initial_of
from bslora_convert.bslora.codes.file import NAMES, VERSION, check_codes, stored_numbers
from bslora_convert.bslora.common import provide
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.tensors import assemble, named_tensors
from bslora_convert.errors import InputError
from bslora_convert.files.address import resolve
from bslora_convert.files.integrity import CHANGED, CHECKED, NO_RECORD, integrity
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.record import FIDELITY_NAME
from bslora_convert.files.tensorfile import (
    FLOATS,
    check_finite,
    check_passenger,
    dtype_name,
    file_bytes,
    read_tensors,
    write_tensors,
)
from bslora_convert.initialisation.initial import Initial
from bslora_convert.lora.fields import inherited
from bslora_convert.lora.targets import target_fields
from bslora_convert.modules.factors import Shape

PEFT_TYPE = "BSLORA"
FORMAT_VERSION = 5
CODING = {"version": VERSION, "group": GROUP}  # what the configuration of an adapter in codes says of them
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class CompactAdapter:
    """A compact directory as read: the form, the tensors carried along, the raw configuration.

    codes: what the form was decoded from, as the file has it; empty where it holds floats.
    integrity: whether the weights are still what was written and measured (`files.record`).
    """

    form: BsloraForm
    layout: Layout
    carried: Mapping[str, Tensor]
    config: Mapping[str, Any]
    path: FilePath
    codes: Mapping[str, Tensor] = field(default_factory=dict)
    integrity: str = NO_RECORD

    @property
    def initial(self) -> Initial | None:
        """The random initialisation that its codes are against, if any."""
        return initial_of(self.layout, self.path)

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the form's tensors."""
        return next(iter(self.form.tensors())).dtype

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of where the weights come from."""
        said = {
            CHECKED: f"{self.path} has no {FIDELITY_NAME}: its weights are what their header has the checksum of, and nobody "
            "knows how they were measured",
            NO_RECORD: f"{self.path} has no {FIDELITY_NAME}, and the header of its weights no checksum (they were saved again): "
            "they were taken as they are",
            CHANGED: f"{self.path / WEIGHTS_NAME} is not what was written and measured; it was taken knowingly, and the figures "
            f"in {FIDELITY_NAME} are not of it",
        }
        return (said[self.integrity],) if self.integrity in said else ()

    @property
    def parts_parameters(self) -> dict[str, int]:
        """Stored numbers, by part; vectors of no bits have none."""
        counts = self.form.parts_parameters()
        if self.layout.origin is not None:
            counts["local"] = stored_numbers(self.codes, self.layout.stored(), ".bslora_local_")
        return counts

    @property
    def parameters(self) -> int:
        """Stored numbers."""
        return sum(self.parts_parameters.values())


def save_compact(
    form: BsloraForm,
    directory: FilePath,
    source_config: Mapping[str, Any],
    carried: Mapping[str, Tensor],
    *,
    codes: Mapping[str, Tensor] | None = None,
    initial: Initial | None = None,
) -> None:
    """Writes the two files into an existing directory.

    source_config: the LoRA's raw PEFT configuration, from which base model and task are taken over.
    carried: tensors that are not part of the form, by name without PEFT's prefix.
    codes: the tensors of `coding.file` that the form was decoded from; written in its place.
    initial: the random initialisation that the codes are against, if any.
    """
    layout, named = Layout.of(form, initial), dict(codes or named_tensors(form))
    tensors = {PREFIX + name: tensor for name, tensor in named.items()}
    tensors |= {PREFIX + name: tensor for name, tensor in carried.items()}
    config = {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        **({"coding": CODING} if codes else {}),
        "inference_mode": True,
        **inherited(source_config),
        **target_fields(form.modules, source_config),
        "dtype": dtype_name(next(form.tensors()).dtype),
        **layout.to_config(),
    }
    write_tensors(directory / WEIGHTS_NAME, tensors, checksum=True)
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def coded_bytes(codes: Mapping[str, Tensor], carried: Mapping[str, Tensor]) -> int:
    """Bytes of the weight file that `save_compact` would write of these codes, or of their sizes, and of what travels along."""
    return file_bytes({PREFIX + name: tensor for name, tensor in {**codes, **carried}.items()})


@dataclass(frozen=True, slots=True)
class CodedAdapter:
    """A compact directory in codes as read, which are checked and not decoded.

    codes: tensors of `coding.file`. dtype: what they are decoded to. carried: whole weights that travel along.
    """

    layout: Layout
    codes: Mapping[str, Tensor]
    dtype: torch.dtype
    carried: Mapping[str, Tensor]
    config: Mapping[str, Any]


def load_compact(path: str | FilePath, *, accept_changed: bool = False) -> CompactAdapter:
    """Reads a compact directory, or `LIBRARY::ID`, and checks everything before handing it out.

    accept_changed: takes weights that are not what was written and measured any more.

    :raises InputError: when files are missing or damaged, the version is unknown, a tensor is missing, left over, of another
        shape, of another dtype or not finite, or the weights are not what was written.
    """
    return _decoded(_read(path, accept_changed))


def load_coded(path: str | FilePath, *, accept_changed: bool = False) -> CodedAdapter | CompactAdapter:
    """As `load_compact`, but what is in codes stays so."""
    read = _read(path, accept_changed)
    if not has_codes(read.config):
        return _decoded(read)
    dtype = decoded_dtype(read.config, read.directory / CONFIG_NAME)
    check_codes(read.codes, read.layout.stored(), dtype, read.directory / WEIGHTS_NAME, read.layout.initial)
    _check_passengers(read)
    return CodedAdapter(read.layout, read.codes, dtype, read.tensors, read.config)


@dataclass(frozen=True, slots=True)
class _Read:
    """A compact directory's two files. codes: the tensors of `coding.file` among them, tensors: the others."""

    directory: FilePath
    config: Mapping[str, Any]
    layout: Layout
    codes: dict[str, Tensor]
    tensors: dict[str, Tensor]
    state: str


def _read(path: str | FilePath, accept_changed: bool) -> _Read:
    directory = resolve(path)
    if not directory.exists():
        raise InputError(f"{directory}: no such directory")
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    config = read_json(config_path)
    if config.get("peft_type") != PEFT_TYPE:
        raise InputError(
            f"{config_path}: peft_type is {config.get('peft_type')!r}, a compact adapter says {PEFT_TYPE!r}"
        )
    check_version(config, config_path)
    with ThreadPoolExecutor(1) as pool:  # hashing leaves the interpreter lock
        checking = pool.submit(integrity, directory, weights_path)
        read = read_tensors(weights_path)
        state = checking.result()
    if state == CHANGED and not accept_changed:
        raise InputError(changed(directory))
    tensors = {}
    for key, tensor in read.items():
        if not key.startswith(PREFIX):
            raise InputError(f"{weights_path}: tensor {key}: every key starts with {PREFIX!r}")
        tensors[key.removeprefix(PREFIX)] = tensor
    layout = Layout.parse(config, config_path)
    provide(layout, directory)
    codes = {name: tensors.pop(name) for name in NAMES if name in tensors} if has_codes(config) else {}
    return _Read(directory, config, layout, codes, tensors, state)


def _decoded(read: _Read) -> CompactAdapter:
    config_path, weights_path = read.directory / CONFIG_NAME, read.directory / WEIGHTS_NAME
    config, layout = read.config, read.layout
    if has_codes(config):
        taken = from_file(read.codes, layout, decoded_dtype(config, config_path), weights_path)
    else:
        taken = {key: _take(weights_path, read.tensors, key, shape) for key, shape in layout.stored()}
    _check_passengers(read)
    dtypes = {tensor.dtype for tensor in taken.values()}
    if len(dtypes) > 1:
        raise InputError(f"{weights_path}: tensors of several dtypes: {sorted(map(str, dtypes))}")
    form = assemble(layout, taken)
    return CompactAdapter(form, layout, read.tensors, config, read.directory, read.codes, read.state)


def _check_passengers(read: _Read) -> None:
    """Refuses what is left once the form has been taken and may not travel along."""
    weights_path = read.directory / WEIGHTS_NAME
    left = [key for key in read.tensors if ".bslora_" in f".{key}"]
    if left:
        raise InputError(f"{weights_path}: tensor {left[0]} belongs to no module of {CONFIG_NAME}")
    for key, tensor in read.tensors.items():
        check_passenger(weights_path, key, tensor)


def changed(directory: FilePath) -> str:
    """Why a directory is not read whose weights are not what was written, and how to go on knowingly."""
    return (
        f"{directory / WEIGHTS_NAME}: not the file that was written and measured (its SHA-256 is not that in {FIDELITY_NAME}, or "
        "in its own header): it was damaged, or saved again; convert it anew, or take it as it is with --accept-changed "
        "(accept_changed=True)"
    )


def check_version(config: Mapping[str, Any], where: object) -> None:
    """Refuses a format that this version does not read.

    :raises InputError: naming `where`.
    """
    version, coding = config.get("format_version"), config.get("coding")
    if type(version) is not int or version != FORMAT_VERSION:
        raise InputError(
            f"{where}: format_version is {version!r}, this version reads {FORMAT_VERSION}; convert the LoRA again"
        )
    if coding is not None and coding != CODING:
        raise InputError(f"{where}: coding is {coding!r}, this version reads {CODING}; convert the LoRA again")


def has_codes(config: Mapping[str, Any]) -> bool:
    """Whether the adapter of a configuration, which has been checked, is in codes."""
    return config.get("coding") is not None


def decoded_dtype(config: Mapping[str, Any], where: object) -> torch.dtype:
    """What codes are decoded to.

    :raises InputError: when the configuration names no float type.
    """
    names = {dtype_name(dtype): dtype for dtype in FLOATS}
    if config.get("dtype") not in names:
        raise InputError(f"{where}: dtype is {config.get('dtype')!r}: one of {', '.join(names)} is allowed")
    return names[config["dtype"]]


def _take(path: FilePath, tensors: dict[str, Tensor], key: str, shape: Shape) -> Tensor:
    """Takes one tensor of the layout out of `tensors`."""
    tensor = tensors.pop(key, None)
    if tensor is None:
        raise InputError(f"{path}: tensor {key} is missing")
    if tuple(tensor.shape) != shape:
        raise InputError(f"{path}: tensor {key} has shape {tuple(tensor.shape)}, {shape} is expected")
    if tensor.dtype not in FLOATS:
        raise InputError(f"{path}: tensor {key} is {tensor.dtype}, a float type is expected")
    check_finite(path, key, tensor)
    return tensor
