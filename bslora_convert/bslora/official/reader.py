"""The authors' directory -> form: each shared tensor taken once, after every copy of it was compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import torch
from torch import Tensor

from bslora_convert.bslora.form import LEVELS, PARTS, BsloraForm, Module, Path
from bslora_convert.bslora.layout import LARGEST_SIDE
from bslora_convert.bslora.official.config import INHERITED, check_plan, read_mode
from bslora_convert.bslora.official.plan import (
    KEY,
    MODES,
    MODULE,
    OFFICIAL_TYPE,
    SCALING,
    OfficialPlan,
    fits,
    group_of,
    key_of,
    target_modules,
)
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice, Transform
from bslora_convert.errors import InputError, Refused
from bslora_convert.files.jsonfile import read_json
from bslora_convert.files.tensorfile import FLOATS, check_finite, read_tensors
from bslora_convert.lora.keys import canonical
from bslora_convert.lora.place import CONFIG_NAME, locate
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.names import natural_order

Held = Mapping[str, Mapping[str, tuple[str, Tensor]]]  # module -> the authors' name -> (key, tensor)


@dataclass(frozen=True, slots=True)
class OfficialAdapter:
    """The authors' directory as read: the form with their scaling folded in, and what their file stores.

    stored: numbers in the file, every copy counted.
    """

    form: BsloraForm
    config: Mapping[str, Any]
    path: FilePath
    weights: FilePath
    stored: int
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype, the same for every tensor."""
        return next(self.form.tensors()).dtype

    @property
    def inherited(self) -> dict[str, Any]:
        """PEFT fields that mean the same for an adapter in another form, those that are set."""
        fields = {field: self.config[field] for field in INHERITED if self.config.get(field) is not None}
        return fields | {"target_modules": target_modules(self.form.modules)}

    @property
    def copied(self) -> int:
        """Numbers in the file that only repeat a shared tensor."""
        pairs = {
            level: {group: pair.parameters for group, pair in of.items()} for level, of in self.form.shared.items()
        }
        once = sum(sum(groups.values()) for groups in pairs.values())
        uses = [(level, path.group) for module in self.form.modules.values() for level, path in module.paths.items()]
        return sum(pairs[level][group] for level, group in uses) - once


@dataclass(frozen=True, slots=True)
class _File:
    """A weight file sorted by module, and the share mode that its configuration says."""

    path: FilePath
    mode: str
    held: Held

    def key(self, module: str, name: str) -> str:
        return self.held[module][name][0]

    def take(self, module: str, name: str) -> Tensor:
        """One tensor.

        :raises InputError: when it is missing.
        """
        if name not in self.held[module]:
            raise InputError(
                f"{self.path}: tensor {key_of(module, name)} is missing; share_mode {self.mode!r} needs it"
            )
        return self.held[module][name][1]

    def shape(self, module: str) -> Shape:
        """(out, in) of a module, from its local pair."""
        return self.take(module, "lora_B.local").shape[0], self.take(module, "lora_A.local").shape[1]

    def doubled(self, module: str, part: str) -> Factors:
        """A pair with the authors' scaling folded into B; exact, as a float only changes its exponent.

        :raises Refused: when the dtype can't hold it.
        """
        b, a = (self.take(module, f"lora_{side}.{part}") for side in "BA")
        scaled = b * SCALING
        if not torch.isfinite(scaled).all():
            key = self.key(module, f"lora_B.{part}")
            raise Refused(
                f"{self.path}: tensor {key}: twice its numbers overflow {b.dtype}; store the adapter in float32 first"
            )
        return Factors(scaled, a)


def is_official(path: str | FilePath) -> bool:
    """Whether this is an adapter in the authors' layout; what can't be read is left to the readers to complain of."""
    try:
        directory, _ = locate(FilePath(path))
        return read_json(directory / CONFIG_NAME).get("peft_type") == OFFICIAL_TYPE
    except InputError:
        return False


def load_official(path: str | FilePath) -> OfficialAdapter:
    """Reads a directory of the authors' code, or its weight file.

    A path of rank 0 is left out of the form, and with it kernels or gates, which then have no effect.

    :raises InputError: when a file is missing or damaged, a tensor is missing, of another shape or not finite, copies of a
        shared tensor differ, or the tensors contradict the configuration.
    :raises Refused: for an unknown share mode, several adapters in one file, tensors that the layout does not have, and
        modules that are not named as Llama's are.
    """
    directory, weights = locate(FilePath(path))
    config_path = directory / CONFIG_NAME
    config = read_json(config_path)
    mode = read_mode(config, config_path)
    tensors = read_tensors(weights)
    file = _File(weights, mode, _sorted(weights, tensors))
    _check_tensors(file)
    plan = _plan(file)
    for module in file.held:
        _check_shapes(file, module, plan)
    check_plan(config, config_path, plan)
    stored = sum(tensor.numel() for tensor in tensors.values())
    return OfficialAdapter(_form(file, plan), config, FilePath(path), weights, stored, _notes(config))


def _sorted(path: FilePath, tensors: Mapping[str, Tensor]) -> Held:
    """Tensors by module, in natural order, and name.

    :raises InputError: when there is none, or two for one place.
    :raises Refused: for several adapters, other keys, and other names of modules.
    """
    held: dict[str, dict[str, tuple[str, Tensor]]] = {}
    adapters: dict[str | None, str] = {}
    for key, tensor in tensors.items():
        match = KEY.match(canonical(key))
        if match is None:
            raise Refused(f"{path}: tensor {key}: the authors' layout has no such tensor, so what it does is not known")
        adapters.setdefault(match["adapter"], key)
        if len(adapters) > 1:
            first, second = adapters.values()
            raise Refused(f"{path}: {first} and {second} are of several adapters in one file; save each on its own")
        module, name = match["module"], f"{match['box']}.{match['name']}"
        if not MODULE.match(module):
            raise Refused(
                f"{path}: tensor {key}: {module} is not of the form model.layers.N.block.module, "
                "by which the authors' code knows a layer"
            )
        if name in held.setdefault(module, {}):
            raise InputError(f"{path}: tensor {key}: a second tensor for {module} {name} in one file")
        held[module][name] = (key, tensor)
    if not held:
        raise InputError(f"{path}: holds no tensors")
    return {module: held[module] for module in sorted(held, key=natural_order)}


def _check_tensors(file: _File) -> None:
    """Refuses what is not a finite matrix, all of one float type.

    :raises InputError: naming file and tensor.
    """
    first: tuple[str, torch.dtype] | None = None
    for tensors in file.held.values():
        for key, tensor in tensors.values():
            if tensor.ndim != 2:
                raise InputError(f"{file.path}: tensor {key} has shape {tuple(tensor.shape)}, a matrix is expected")
            if max(tensor.shape) >= LARGEST_SIDE:
                raise InputError(f"{file.path}: tensor {key} has shape {tuple(tensor.shape)}, no model is as large")
            if tensor.dtype not in FLOATS:
                raise InputError(f"{file.path}: tensor {key} is {tensor.dtype}, a float type is expected")
            first = first or (key, tensor.dtype)
            if tensor.dtype != first[1]:
                raise InputError(
                    f"{file.path}: tensor {key} is {tensor.dtype} and {first[0]} is {first[1]}; one dtype is expected"
                )
            check_finite(file.path, key, tensor)


def _plan(file: _File) -> OfficialPlan:
    """Transform and ranks, from the shapes of the first module's tensors.

    :raises InputError: when they make no sense.
    """
    module = next(iter(file.held))
    ranks = {part: file.take(module, f"lora_A.{part}").shape[0] for part in PARTS}
    if not any(ranks.values()):
        raise InputError(f"{file.path}: the ranks of all three paths are 0, so the adapter changes nothing")
    rows = file.take(module, "lora_B.inter").shape[0]
    columns = file.take(module, "lora_A.inter").shape[1]
    if not rows or not columns or (file.mode != "slice" and rows != columns):
        raise InputError(
            f"{file.path}: {file.key(module, 'lora_B.inter')} has {rows} rows and its partner lora_A {columns} columns; "
            + ("sizes above 0 are expected" if file.mode == "slice" else "one size above 0 is expected")
        )
    transforms: dict[str, Transform] = {"ss": Slice(rows, columns), "gt": Gate(rows), "ke": Kronecker(rows)}
    return OfficialPlan(transforms[MODES[file.mode]], ranks)


def _check_shapes(file: _File, module: str, plan: OfficialPlan) -> None:
    """Compares a module's tensors with what the plan has for it.

    :raises InputError: when one is missing, left over or of another shape, or the module can't be cut from or covered by
        the shared factors.
    """
    shape = file.shape(module)
    where = f"{file.path}: tensor {file.key(module, 'lora_B.local')}"
    if 0 in shape or max(shape) >= LARGEST_SIDE:
        raise InputError(f"{where}: a module of {shape[0]}×{shape[1]} is not one of a model")
    if reason := fits(plan.transform, shape):
        raise InputError(f"{where}: {reason}")
    expected = plan.shapes(shape)
    for name, (key, tensor) in file.held[module].items():
        if name not in expected:
            raise InputError(
                f"{file.path}: tensor {key} contradicts share_mode {file.mode!r}, which has no such tensor"
            )
        if tuple(tensor.shape) != expected[name]:
            raise InputError(f"{file.path}: tensor {key} has shape {tuple(tensor.shape)}, {expected[name]} is expected")
    idle = {name for level in LEVELS if not plan.ranks[level] for name in plan.own(level).values()}
    for name in expected:
        if name not in idle:
            file.take(module, name)


def _form(file: _File, plan: OfficialPlan) -> BsloraForm:
    """The form, shared pairs taken from the first module that uses them.

    :raises InputError: when another module's copy differs.
    """
    levels = [level for level in LEVELS if plan.ranks[level]]
    owners: dict[tuple[str, str], str] = {}
    modules = {}
    for name in file.held:
        paths = {}
        for level in levels:
            group = group_of(level, name)
            _check_copy(file, level, owners.setdefault((level, group), name), name)
            paths[level] = Path(group, {ours: file.take(name, theirs) for ours, theirs in plan.own(level).items()})
        modules[name] = Module(file.shape(name), file.doubled(name, "local"), paths)
    shared: dict[str, dict[str, Factors]] = {}
    for (level, group), owner in owners.items():
        shared.setdefault(level, {})[group] = file.doubled(owner, level)
    return BsloraForm(plan.transform, modules, shared)


def _check_copy(file: _File, level: str, owner: str, module: str) -> None:
    """Compares a module's copy of a shared pair with its owner's; the authors' code would let the last one win.

    :raises InputError: naming the two keys.
    """
    for name in (f"lora_A.{level}", f"lora_B.{level}"):
        if not _same_bits(file.take(owner, name), file.take(module, name)):
            raise InputError(
                f"{file.path}: {file.key(owner, name)} and {file.key(module, name)} are copies of one shared tensor but "
                "differ; which one was trained can't be known"
            )


def _same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two matrices of one shape and dtype are the same bytes, signs of zeros included."""
    if first is second or not first.numel():
        return True
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


def _notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    alpha = config.get("lora_alpha")
    if alpha is None:
        return ()
    return (
        f"lora_alpha is {alpha!r:.60}; the authors' code multiplies by {SCALING:g} whatever it says, and so does this",
    )
