"""Bases that adapters of a library share, stored once, and how one adapter's local parts are put together from them.

    both    B A = U C V     core C (p, q)                          U (out, p), V (q, in) from the library
    left    B A = U A       core A (p, in)
    right   B A = B V       core B (out, q)

`LIBRARY/.bases/<sha256>.safetensors` holds `<module>.left` and `<module>.right`; its name is the hash of its bytes, so it never
changes. An adapter keeps its cores where its local factors would be (`bslora_local_C`, or `_A` or `_B` alone); its configuration
names the file in `bases`, and each module's sizes in `basis`. What is read is a plain local part of the `rank` that the
configuration gives: U C and V, or U and C V, whichever is thinner; or, where the rank is lower (an update of rank 16 in wider
bases), U X and Y V with X Y the best part of C of that rank. Products are made in float64 and rounded to the dtype of storage.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.bslora.layout import LARGEST_SIDE, Entry, Layout
from bslora_convert.errors import InputError
from bslora_convert.files.hashing import sha256
from bslora_convert.files.remote import BASES
from bslora_convert.files.tensorfile import check_finite, read_tensors
from bslora_convert.modules.factors import Factors, Shape

DIRECTORY = BASES
HASH = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Columns p of a module's left basis and rows q of its right one, 0 where a side is not shared; rank of the local part."""

    left: int
    right: int
    rank: int

    @classmethod
    def of(cls, left: int = 0, right: int = 0, rank: int | None = None) -> "Sizes":
        """rank: of the update; between two bases the local part has no more than that."""
        full = min(left or right, right or left)
        return cls(left, right, min(full, rank) if rank is not None and left and right else full)

    @property
    def factor(self) -> str:
        """Under which name the core is stored: C between two bases, else the factor that the module keeps."""
        return "C" if self.left and self.right else "A" if self.left else "B"

    def core(self, shape: Shape) -> Shape:
        """Shape of the core of a module of shape (out, in)."""
        return self.left or shape[0], self.right or shape[1]

    def bases(self, shape: Shape) -> dict[str, Shape]:
        """Shapes of the bases by side."""
        shapes = {"left": (shape[0], self.left), "right": (self.right, shape[1])}
        return {side: shape for side, shape in shapes.items() if 0 not in shape}

    def parameters(self, shape: Shape) -> int:
        """Numbers of the bases."""
        return sum(map(prod, self.bases(shape).values()))


@dataclass(frozen=True, slots=True)
class Basis:
    """One module's bases: left U (out, p), right V (q, in), None where a side is not shared."""

    left: Tensor | None
    right: Tensor | None

    @property
    def sizes(self) -> Sizes:
        """Their sizes, for an update of any rank."""
        return self.sizes_for(None)

    def sizes_for(self, rank: int | None) -> Sizes:
        """Their sizes for an update of a rank."""
        left = self.left.shape[1] if self.left is not None else 0
        return Sizes.of(left, self.right.shape[0] if self.right is not None else 0, rank)

    @property
    def parameters(self) -> int:
        """Stored numbers."""
        return sum(side.numel() for side in (self.left, self.right) if side is not None)

    def to(self, dtype: torch.dtype) -> "Basis":
        """The same in another dtype."""
        return Basis(*(None if side is None else side.to(dtype) for side in (self.left, self.right)))

    def fits(self, shape: Shape, dtype: torch.dtype) -> bool:
        """Whether these are bases for a module of shape (out, in) stored in a dtype."""
        sides = [side for side in (self.left, self.right) if side is not None]
        heights = self.left is None or self.left.shape[0] == shape[0]
        return (
            heights and (self.right is None or self.right.shape[1] == shape[1]) and all(s.dtype == dtype for s in sides)
        )

    def with_core(self, core: Tensor, rank: int) -> Factors:
        """The local part of a core, of a rank, in the core's dtype."""
        left, right = self.left, self.right
        if left is None or right is None:
            return Factors(core if left is None else left, core if right is None else right)
        if rank < min(core.shape):
            x, sigma, y = torch.linalg.svd(core.double(), full_matrices=False)
            root = sigma[:rank].sqrt()
            b, a = left.double() @ (x[:, :rank] * root), (root[:, None] * y[:rank]) @ right.double()
            return Factors(b.to(core.dtype), a.to(core.dtype))
        if left.shape[1] >= right.shape[0]:
            return Factors((left.double() @ core.double()).to(core.dtype), right)
        return Factors(left, (core.double() @ right.double()).to(core.dtype))


@dataclass(frozen=True, slots=True)
class Uses:
    """What an adapter takes from a library: the hash of the file, and the sizes of each module that uses it."""

    file: str
    sizes: Mapping[str, Sizes]

    def tensors(self, layout: Layout) -> Iterator[tuple[str, Shape]]:
        """Every tensor in the adapter's own file and its shape: the layout's, cores in place of local factors."""
        locals_ = {f"{name}.bslora_local_{factor}" for name in self.sizes for factor in "AB"}
        for key, shape in layout.tensors():
            if key not in locals_:
                yield key, shape
        for name, sizes in self.sizes.items():
            yield f"{name}.bslora_local_{sizes.factor}", sizes.core(layout.modules[name].shape)

    def local(self, layout: Layout, tensors: Mapping[str, Tensor], directory: Path) -> dict[str, Tensor]:
        """Local factors by key, put together from the cores among `tensors` and the bases of the library around `directory`.

        :raises InputError: when the file of bases is missing or damaged, is not what its name says, or does not fit.
        """
        path = find(directory, self.file)
        shapes = {name: sizes.bases(layout.modules[name].shape) for name, sizes in self.sizes.items()}
        bases = read(path, shapes)
        found: dict[str, Tensor] = {}
        for name, sizes in self.sizes.items():
            core, basis = tensors[f"{name}.bslora_local_{sizes.factor}"].cpu(), bases[name]
            for side in (basis.left, basis.right):
                if side is not None and side.dtype != core.dtype:
                    raise InputError(f"{path}: the basis of {name} is {side.dtype}, {core.dtype} is expected")
            factors = basis.with_core(core, sizes.rank)
            found |= {f"{name}.bslora_local_A": factors.a, f"{name}.bslora_local_B": factors.b}
        return found

    def to_config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with `bases`, and `basis` in the modules."""
        modules = dict(config["modules"])
        for name, sizes in self.sizes.items():
            held = {"left": sizes.left, "right": sizes.right}
            modules[name] = {**modules[name], "basis": {side: size for side, size in held.items() if size}}
        return {**config, "bases": self.file, "modules": modules}


@dataclass(frozen=True, slots=True)
class Cores:
    """An adapter's own part of what it shares: which bases, and the core of each module."""

    uses: Uses
    tensors: Mapping[str, Tensor]


def parse(config: Mapping[str, Any], modules: Mapping[str, Entry], where: object) -> Uses:
    """What a configuration says of bases.

    :raises InputError: naming `where` and the field.
    """
    file = config.get("bases")
    if not isinstance(file, str) or not HASH.fullmatch(file):
        raise InputError(f"{where}: bases is {file!r}, a SHA-256 in lower-case hex is expected")
    found = {}
    for name, entry in modules.items():
        said = config["modules"][name].get("basis")
        if said is None:
            continue
        field = f"{where}: modules[{name}].basis is {said!r}"
        if not isinstance(said, dict) or not said or not set(said) <= {"left", "right"}:
            raise InputError(f"{field}, an object with left or right is expected")
        if not all(type(size) is int and 0 < size < LARGEST_SIDE for size in said.values()):
            raise InputError(f"{field}, positive whole numbers are expected")
        sizes = Sizes.of(**said, rank=entry.rank)
        if sizes.rank != entry.rank or not entry.rank:
            raise InputError(f"{field}, which can't give a local part of rank {entry.rank}")
        found[name] = sizes
    if not found:
        raise InputError(f"{where}: bases is given and no module has a basis")
    return Uses(file, found)


def find(directory: Path, file: str) -> Path:
    """The file of bases of the library that a directory stands in, at any depth.

    :raises InputError: when there is none.
    """
    for above in directory.absolute().parents:
        path = above / DIRECTORY / f"{file}.safetensors"
        if path.is_file():
            return path
    raise InputError(
        f"{directory}: it needs {DIRECTORY}/{file}.safetensors of the library that it was made in; "
        "read it there, or expand it there first"
    )


def read(path: Path, wanted: Mapping[str, Mapping[str, Shape]] | None = None) -> dict[str, Basis]:
    """Bases by module. wanted: shapes by module and side that must be there; None: whatever is.

    :raises InputError: when the file is damaged, its bytes are not what its name says, or a tensor is missing, of another
        shape or not finite.
    """
    digest = sha256(path)
    if digest != path.stem:
        raise InputError(f"{path}: the file has SHA-256 {digest}, not that of its name; it was changed")
    tensors = read_tensors(path)
    wanted = _named(path, tensors) if wanted is None else wanted
    found = {}
    for name, sides in wanted.items():
        for side, shape in sides.items():
            key = f"{name}.{side}"
            if key not in tensors:
                raise InputError(f"{path}: tensor {key} is missing")
            if tuple(tensors[key].shape) != shape:
                raise InputError(f"{path}: tensor {key} has shape {tuple(tensors[key].shape)}, {shape} is expected")
            check_finite(path, key, tensors[key])
        found[name] = Basis(*(tensors[f"{name}.{side}"] if side in sides else None for side in ("left", "right")))
    return found


def _named(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Shape]]:
    """Shapes of all bases, by module and side.

    :raises InputError: for a tensor that is none.
    """
    shapes: dict[str, dict[str, Shape]] = {}
    for key, tensor in tensors.items():
        name, _, side = key.rpartition(".")
        if side not in ("left", "right") or tensor.ndim != 2 or 0 in tensor.shape:
            raise InputError(f"{path}: tensor {key}: a matrix <module>.left or <module>.right is expected")
        shapes.setdefault(name, {})[side] = (tensor.shape[0], tensor.shape[1])
    return shapes


def named_tensors(bases: Mapping[str, Basis]) -> dict[str, Tensor]:
    """What a file of bases holds."""
    sides = ((f"{name}.{side}", getattr(basis, side)) for name, basis in bases.items() for side in ("left", "right"))
    return {key: tensor for key, tensor in sides if tensor is not None}
