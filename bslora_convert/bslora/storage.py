"""Compact directory <-> form: two files, each shared tensor once.

`adapter_model.safetensors`, keys below `base_model.model.<module>.`:

    bslora_local.A  (r, in)      bslora_local.B  (out, r)         every module
    bslora_intra.A  (p, s_in)    bslora_intra.B  (s_out, p)       only under the first module of each group, which owns the pair
    bslora_inter.A               bslora_inter.B
    bslora_intra_own.<name>      bslora_inter_own.<name>          kernels (A, B) or gates of each module that shares

`adapter_config.json` is a PEFT configuration with peft_type BSLORA; `modules` says for each module its shape, its kind where
it isn't a linear layer, and the groups that it shares with. The shapes of everything else follow, and the reader checks them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path as FilePath
from typing import Any, cast

import torch
from torch import Tensor

from bslora_convert.bslora.factors import Factors, Shape
from bslora_convert.bslora.form import KINDS, LEVELS, BsloraForm, Module, Path
from bslora_convert.bslora.transforms import TRANSFORMS, Slice, Transform
from bslora_convert.errors import InputError
from bslora_convert.tensorfile import FLOATS, check_finite, read_json, read_tensors, write_tensors

PEFT_TYPE = "BSLORA"
FORMAT_VERSION = 1
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
LARGEST_SIDE = 1 << 24

# PEFT fields of the source that mean the same for the compact adapter.
INHERITED = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "modules_to_save",
    "revision",
    "task_type",
    "trainable_token_indices",
)


@dataclass(frozen=True, slots=True)
class CompactAdapter:
    """A compact directory as read: the form, the tensors carried along, and the raw configuration."""

    form: BsloraForm
    carried: Mapping[str, Tensor]
    config: Mapping[str, Any]
    path: FilePath

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the form's tensors."""
        return next(iter(self.form.tensors())).dtype


def save_compact(
    form: BsloraForm, directory: FilePath, source_config: Mapping[str, Any], carried: Mapping[str, Tensor]
) -> None:
    """Writes the two files into an existing directory.

    source_config: the LoRA's raw PEFT configuration, from which base model and task are taken over.
    carried: tensors that are not part of the form, by name without PEFT's prefix.
    """
    tensors = {PREFIX + name: tensor for name, tensor in _named_tensors(form).items()}
    tensors |= {PREFIX + name: tensor for name, tensor in carried.items()}
    config = {
        "peft_type": PEFT_TYPE,
        "format_version": FORMAT_VERSION,
        "inference_mode": True,
        **{field: source_config[field] for field in INHERITED if source_config.get(field) is not None},
        "target_modules": _target_modules(form, source_config),
        "transform": transform_to_dict(form.transform),
        "modules": {name: _module_to_dict(module) for name, module in form.modules.items()},
    }
    write_tensors(directory / WEIGHTS_NAME, tensors)
    (directory / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def load_compact(path: str | FilePath) -> CompactAdapter:
    """Reads a compact directory and checks everything before handing it out.

    :raises InputError: when files are missing or damaged, the version is unknown, or a tensor is missing, left over, of
        another shape, of another dtype or not finite.
    """
    directory = FilePath(path)
    if not directory.exists():
        raise InputError(f"{directory}: no such directory")
    config_path, weights_path = directory / CONFIG_NAME, directory / WEIGHTS_NAME
    config = read_json(config_path)
    if config.get("peft_type") != PEFT_TYPE:
        raise InputError(
            f"{config_path}: peft_type is {config.get('peft_type')!r}, a compact adapter says {PEFT_TYPE!r}"
        )
    if config.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{config_path}: format_version is {config.get('format_version')!r}, this version reads {FORMAT_VERSION}"
        )
    tensors = {}
    for key, tensor in read_tensors(weights_path).items():
        if not key.startswith(PREFIX):
            raise InputError(f"{weights_path}: tensor {key}: every key starts with {PREFIX!r}")
        tensors[key.removeprefix(PREFIX)] = tensor
    transform = _transform_from_dict(config_path, config.get("transform"))
    form = _Reader(config_path, weights_path, transform, tensors).form(config.get("modules"))
    return CompactAdapter(form, tensors, config, directory)


def _target_modules(form: BsloraForm, source_config: Mapping[str, Any]) -> list[str]:
    """The source's list of name endings where it alone says which modules are adapted, else every module's full name."""
    targets = source_config.get("target_modules")
    narrowed = any(source_config.get(field) for field in ("layers_to_transform", "layers_pattern", "exclude_modules"))
    if isinstance(targets, list) and targets and not narrowed:
        endings = tuple(f".{target}" for target in targets if isinstance(target, str))
        if all(f".{name}".endswith(endings) for name in form.modules):
            return sorted(targets)
    return list(form.modules)


def transform_to_dict(transform: Transform | None) -> dict[str, Any]:
    """The transform's name and settings."""
    if transform is None:
        return {"name": "none"}
    return {"name": transform.name, **asdict(cast(Any, transform))}


def _transform_from_dict(path: FilePath, value: Any) -> Transform | None:
    if not isinstance(value, dict) or value.get("name") not in ("none", *TRANSFORMS):
        raise InputError(f"{path}: transform is {value!r}, a name of none, {', '.join(TRANSFORMS)} is expected")
    if value["name"] == "none":
        return None
    settings = {key: setting for key, setting in value.items() if key != "name"}
    for key, setting in settings.items():
        if key.startswith("size") and not (_is_whole(setting) and 0 < setting < LARGEST_SIDE):
            raise InputError(f"{path}: transform.{key} is {setting!r}, a positive whole number is expected")
    kind: Any = TRANSFORMS[value["name"]]
    try:
        transform: Transform = kind(**settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: transform: {error}") from None
    return transform


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _named_tensors(form: BsloraForm) -> dict[str, Tensor]:
    """Every tensor of the form by its key; a pair stands under the first module that uses it."""
    tensors: dict[str, Tensor] = {}
    owned: set[tuple[str, str]] = set()
    for name, module in form.modules.items():
        tensors[f"{name}.bslora_local.A"] = module.local.a
        tensors[f"{name}.bslora_local.B"] = module.local.b
        for level, path in module.paths.items():
            for own, tensor in path.own.items():
                tensors[f"{name}.bslora_{level}_own.{own}"] = tensor
            if (level, path.group) not in owned:
                owned.add((level, path.group))
                pair = form.pair(level, path.group)
                tensors[f"{name}.bslora_{level}.A"] = pair.a
                tensors[f"{name}.bslora_{level}.B"] = pair.b
    return tensors


def _module_to_dict(module: Module) -> dict[str, Any]:
    entry: dict[str, Any] = {"shape": list(module.shape)}
    if module.kind != "linear":
        entry["kind"] = module.kind
    return entry | {level: path.group for level, path in module.paths.items()}


@dataclass(slots=True)
class _Reader:
    """Takes the form's tensors out of `tensors`, checking each; what is left over is carried."""

    config_path: FilePath
    weights_path: FilePath
    transform: Transform | None
    tensors: dict[str, Tensor]

    def form(self, modules: Any) -> BsloraForm:
        """The whole form."""
        if not isinstance(modules, dict) or not modules:
            raise InputError(f"{self.config_path}: modules is empty or not an object")
        entries = {name: self._entry(name, entry) for name, entry in modules.items()}
        shared = self._shared(entries)
        form = BsloraForm(
            self.transform, {name: self._module(name, *entry, shared) for name, entry in entries.items()}, shared
        )
        left = [key for key in self.tensors if ".bslora_" in key]
        if left:
            raise InputError(f"{self.weights_path}: tensor {left[0]} belongs to no module of {self.config_path.name}")
        dtypes = {tensor.dtype for tensor in form.tensors()}
        if len(dtypes) > 1:
            raise InputError(f"{self.weights_path}: tensors of several dtypes: {sorted(map(str, dtypes))}")
        return form

    def _entry(self, name: str, entry: Any) -> tuple[Shape, str, dict[str, str]]:
        where = f"{self.config_path}: modules[{name}]"
        if not isinstance(entry, dict) or not isinstance(entry.get("shape"), list):
            raise InputError(f"{where}: an object with a shape is expected")
        shape = entry["shape"]
        if len(shape) != 2 or not all(_is_whole(side) and 0 < side < LARGEST_SIDE for side in shape):
            raise InputError(f"{where}: shape is {shape!r}, two positive whole numbers are expected")
        kind = entry.get("kind", "linear")
        if kind not in KINDS:
            raise InputError(f"{where}: kind is {kind!r}, one of {', '.join(KINDS)} is expected")
        if isinstance(self.transform, Slice) and (
            shape[0] > self.transform.size_out or shape[1] > self.transform.size_in
        ):
            raise InputError(f"{where}: shape {shape} is larger than the shared factors it would be a window of")
        groups = {level: entry[level] for level in LEVELS if level in entry}
        if groups and self.transform is None:
            raise InputError(f"{where}: shares with a group although the transform is none")
        if not all(isinstance(group, str) for group in groups.values()):
            raise InputError(f"{where}: a group's name is a string")
        return (shape[0], shape[1]), kind, groups

    def _shared(self, entries: Mapping[str, tuple[Shape, str, dict[str, str]]]) -> dict[str, dict[str, Factors]]:
        """Each group's pair, from the member that owns it: the one whose key is in the file."""
        members: dict[tuple[str, str], list[str]] = {}
        for name, (_, _, groups) in entries.items():
            for level, group in groups.items():
                members.setdefault((level, group), []).append(name)
        shared: dict[str, dict[str, Factors]] = {}
        for (level, group), names in members.items():
            assert self.transform is not None  # _entry has seen to it
            owners = [name for name in names if f"{name}.bslora_{level}.A" in self.tensors] or names
            pair = self._factors(f"{owners[0]}.bslora_{level}", self.transform.pair_sizes)
            shared.setdefault(level, {})[group] = pair
        return shared

    def _module(
        self,
        name: str,
        shape: Shape,
        kind: str,
        groups: Mapping[str, str],
        shared: Mapping[str, Mapping[str, Factors]],
    ) -> Module:
        paths = {}
        for level, group in groups.items():
            assert self.transform is not None
            prefix = f"{name}.bslora_{level}_own."
            own = {part: self._take(prefix + part) for part in self.transform.own_names}
            kernel_rank = own["A"].shape[0] if "A" in own and own["A"].ndim == 2 else 1
            for part, expected in self.transform.own_shapes(shape, kernel_rank).items():
                if tuple(own[part].shape) != expected:
                    raise InputError(
                        f"{self.weights_path}: tensor {prefix}{part} has shape {tuple(own[part].shape)}, {expected} is expected"
                    )
            paths[level] = Path(group, own)
        return Module(shape, self._factors(f"{name}.bslora_local", shape), paths, kind)

    def _factors(self, prefix: str, shape: Shape) -> Factors:
        b, a = self._take(f"{prefix}.B"), self._take(f"{prefix}.A")
        if b.ndim != 2 or a.ndim != 2 or b.shape[1] != a.shape[0] or (b.shape[0], a.shape[1]) != shape:
            raise InputError(
                f"{self.weights_path}: {prefix}.B {tuple(b.shape)} and {prefix}.A {tuple(a.shape)} are not factors of a "
                f"{shape[0]} x {shape[1]} matrix"
            )
        return Factors(b, a)

    def _take(self, key: str) -> Tensor:
        tensor = self.tensors.pop(key, None)
        if tensor is None:
            raise InputError(f"{self.weights_path}: tensor {key} is missing")
        if tensor.dtype not in FLOATS:
            raise InputError(f"{self.weights_path}: tensor {key} is {tensor.dtype}, a float type is expected")
        check_finite(self.weights_path, key, tensor)
        return tensor
