"""A PEFT LoRA adapter on disk -> `LoraAdapter`: factors by module name, scaling kept exact beside them.

The tensors are the truth about which modules are adapted and at which rank; the configuration gives the scaling. Tensors that
are not LoRA factors (saved heads, embedding tables) are carried along untouched.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.bslora.factors import Factors, Shape
from bslora_convert.bslora.form import natural_order
from bslora_convert.errors import InputError, Refused
from bslora_convert.files.address import resolve
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.tensorfile import (
    FLOATS,
    check_finite,
    check_not_empty,
    check_passenger,
    dtype_name,
    read_headers,
    read_tensors,
)
from bslora_convert.lora.config import LoraConfig, refuse_unless_convertible

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAMES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
PREFIX = "base_model.model."
LARGEST_SCALING = 1e6

FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight$")
EMBEDDING_FACTOR = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.(?P<adapter>[^.]+))?$")

# Tensors beside the factors that change what the factors mean.
FOREIGN = {
    "lora_magnitude_vector": "DoRA rescales the base weight, so its update is not B·A",
    "lora_B.bias": "lora_bias adds a bias that low-rank factors can't hold",
    "lora_E": "AdaLoRA holds a third factor",
    "lora_diag": "KaSA holds a third factor",
    "lora_ranknum": "AdaLoRA holds a third factor",
}


@dataclass(frozen=True, slots=True)
class LoraModule:
    """One adapted module: ΔW = scaling · b @ a as stored, b (out, r), a (r, in).

    kind `embedding`: b (dim, r), a (r, vocabulary), and the layer adds the transposed product to its table.
    """

    b: Tensor
    a: Tensor
    scaling: float
    kind: str = "linear"

    @property
    def shape(self) -> Shape:
        """(out, in)."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.b.shape[1]

    @property
    def stored(self) -> Factors:
        """The factors as stored, without the scaling."""
        return Factors(self.b, self.a)

    def factors(self) -> Factors:
        """Factors with the scaling folded into b, float32 (float64 where stored so)."""
        dtype = torch.float64 if self.b.dtype == torch.float64 else torch.float32
        return Factors(self.b.to(dtype, copy=True).mul_(self.scaling), self.a.to(dtype))


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """A whole adapter. `carried` holds the tensors that are not factors, `notes` what a reader should know."""

    path: Path
    weights: Path
    config: LoraConfig
    modules: Mapping[str, LoraModule]
    carried: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Stored numbers of the factors; carried tensors don't count."""
        return sum(module.b.numel() + module.a.numel() for module in self.modules.values())

    @property
    def kinds(self) -> dict[str, str]:
        """`linear` or `embedding`, by module."""
        return {name: module.kind for name, module in self.modules.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the factors' numbers are stored in."""
        counts: dict[torch.dtype, int] = {}
        for module in self.modules.values():
            for tensor in (module.b, module.a):
                counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
        return max(counts, key=lambda dtype: counts[dtype])

    def to(self, device: torch.device | str) -> "LoraAdapter":
        """The adapter with its factors on a device."""
        moved = {
            name: replace(module, b=module.b.to(device), a=module.a.to(device)) for name, module in self.modules.items()
        }
        return replace(self, modules=moved)


def load_lora(path: str | Path, *, headers_only: bool = False) -> LoraAdapter:
    """Reads a PEFT LoRA directory, or one of its weight files.

    headers_only: everything is checked but the numbers, which are not read; the factors are meta tensors.

    :raises InputError: when a file is missing, damaged or inconsistent; the message names file and tensor.
    :raises Refused: when the adapter is valid but not a plain LoRA.
    """
    directory, weights = locate(resolve(path))
    config_path = directory / CONFIG_NAME
    raw = read_json(config_path)
    refuse_unless_convertible(raw, config_path)
    config = LoraConfig.parse(raw, config_path)
    factors, kinds, carried = _sort(weights, read_headers(weights) if headers_only else read_tensors(weights))
    names = sorted(factors, key=natural_order)
    modules = {name: _module(weights, name, factors[name], kinds[name], config) for name in names}
    if not modules:
        raise InputError(f"{weights}: holds no LoRA factors (keys ending in lora_A.weight and lora_B.weight)")
    return LoraAdapter(Path(path), weights, config, modules, carried, _notes(modules, config, raw, path, directory))


def locate(path: Path) -> tuple[Path, Path]:
    """Finds (directory of the configuration, weight file).

    path: an adapter directory, a weight file, or a directory whose only adapter stands in a sub-folder, as PEFT writes
    adapters that have a name.

    :raises InputError: when there is none, or more than one.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or directory")
    if path.is_file():
        if path.name == CONFIG_NAME:
            return locate(path.parent)
        if not (path.parent / CONFIG_NAME).is_file():
            raise InputError(
                f"{path}: no {CONFIG_NAME} beside it; the scaling (lora_alpha, r, use_rslora) can't be known without it"
            )
        return path.parent, path
    if not (path / CONFIG_NAME).exists():
        named = sorted(child.parent for child in path.glob(f"*/{CONFIG_NAME}"))
        if len(named) == 1:
            return locate(named[0])
        if named:
            raise InputError(f"{path}: several adapters, name one of {', '.join(str(child) for child in named)}")
        raise InputError(f"{path}: no {CONFIG_NAME}; a PEFT adapter directory is expected")
    for name in WEIGHTS_NAMES:
        if (path / name).exists():
            return path, path / name
    raise InputError(f"{path}: no weights, one of {', '.join(WEIGHTS_NAMES)} is expected")


def canonical(key: str) -> str:
    """A key without PEFT's prefix, however often it was wrapped, and without torch.compile's."""
    key = key.replace("_orig_mod.", "")
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key


def _sort(
    path: Path, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, dict[str, tuple[str, Tensor]]], dict[str, str], dict[str, Tensor]]:
    """Factors by module and side (with their keys), the kind of each module, and everything else."""
    factors: dict[str, dict[str, tuple[str, Tensor]]] = {}
    kinds: dict[str, str] = {}
    carried: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = canonical(key)
        for marker, why in FOREIGN.items():
            if name.endswith(marker) or f".{marker}." in name:
                raise Refused(f"{path}: tensor {key}: {why}")
        linear, embedding = FACTOR.match(name), EMBEDDING_FACTOR.match(name)
        match = linear or embedding
        if match is None:
            if ".lora_" in name:
                raise Refused(f"{path}: tensor {key}: not a LoRA factor that this version knows")
            if name in carried:
                raise InputError(f"{path}: tensor {key}: a second tensor for {name} in one file")
            check_passenger(path, key, tensor)
            carried[name] = tensor
            continue
        module = match["module"]
        if match["side"] in factors.setdefault(module, {}):
            raise InputError(f"{path}: tensor {key}: a second adapter for the same module in one file")
        factors[module][match["side"]] = (key, tensor)
        kinds[module] = "linear" if linear else "embedding"
    return factors, kinds, carried


def _module(
    path: Path, name: str, sides: Mapping[str, tuple[str, Tensor]], kind: str, config: LoraConfig
) -> LoraModule:
    if set(sides) != {"A", "B"}:
        (present,) = sides
        missing = "B" if present == "A" else "A"
        raise InputError(f"{path}: tensor {sides[present][0]}: its partner lora_{missing} is missing")
    (key_a, a), (key_b, b) = sides["A"], sides["B"]
    for key, tensor in ((key_a, a), (key_b, b)):
        if tensor.ndim > 2:
            raise Refused(f"{path}: tensor {key} has {tensor.ndim} dimensions: convolution adapters are not converted")
        check_not_empty(path, key, tensor)
        if tensor.ndim < 2:
            raise InputError(f"{path}: tensor {key} has shape {tuple(tensor.shape)}, a matrix is expected")
        if tensor.dtype not in FLOATS:
            raise Refused(f"{path}: tensor {key} is {dtype_name(tensor.dtype)}: not a plain float type")
        check_finite(path, key, tensor)
    if a.shape[0] != b.shape[1]:
        raise InputError(
            f"{path}: {key_a} {tuple(a.shape)} and {key_b} {tuple(b.shape)} disagree about the rank "
            f"({a.shape[0]} and {b.shape[1]})"
        )
    if ".base_layer." in f".{name}.":
        raise Refused(
            f"{path}: {key_a}: a module inside an adapted module (MultiheadAttention) can't change its rank alone"
        )
    scaling = config.scaling(name, b.shape[1])
    if abs(scaling) > LARGEST_SCALING:
        raise InputError(f"{path}: the scaling of {name} is {scaling:g}; no adapter is trained with such a lora_alpha")
    return LoraModule(b, a, scaling, kind)


def _notes(
    modules: Mapping[str, LoraModule], config: LoraConfig, raw: Mapping[str, Any], asked: str | Path, directory: Path
) -> tuple[str, ...]:
    notes = []
    differing = [name for name, module in modules.items() if module.rank != config.expected_rank(name)]
    if differing:
        name = differing[0]
        notes.append(
            f"{len(differing)} of {len(modules)} modules have another rank than the configuration says "
            f"({name}: {modules[name].rank}, not {config.expected_rank(name)}); the tensors are taken as the truth"
        )
    if Path(asked).is_dir() and Path(asked) != directory:
        notes.append(f"the adapter was found in the sub-folder {directory.name}")
    if str(raw.get("init_lora_weights", "")).lower() == "lora_ga":
        notes.append("LoRA-GA changes the base during training; this file alone is read as a plain LoRA, as PEFT does")
    if raw.get("monteclora_config"):
        notes.append("MonteCLoRA's sampling is a training-time setting and was ignored")
    return tuple(notes)
