"""An initialisation that adapters have in common, as a file beside a library: `initialisation-<hash>.safetensors`.

    metadata        `vectors`: JSON, by key of a tensor (`<module>.bslora_local_A`) how many vectors and how long, in their order
    bslora_widths, bslora_scales, bslora_trellis_<w>        codes of all of these, rows of A₀ and columns of B₀ (`codes.file`)

Vector by vector the decoded numbers x become draws, round((2¹⁵ − 1) x / max |x|) in 16 bits; its scale is left to each adapter.
A place's first draw counts from the beginning of the file. Adapters name the file and no path; readers look for it beside the
adapter, in it, and in every directory above.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from re import compile as pattern
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from bslora_convert.bslora.codes.coded import Coded
from bslora_convert.bslora.codes.file import check_codes, decoded, to_file
from bslora_convert.bslora.layout import LARGEST_SIDE, Layout
from bslora_convert.errors import InputError
from bslora_convert.files.jsonfile import check_file, read_json
from bslora_convert.files.landing import replace_file
from bslora_convert.initialisation.kept import hold, is_held
from bslora_convert.initialisation.stream import HALF
from bslora_convert.lora.place import CONFIG_NAME
from bslora_convert.modules.factors import Shape

VECTORS = "vectors"
NAME = pattern(r"initialisation-[0-9a-f]{16}\.safetensors")
TINY = 1e-30


@dataclass(frozen=True, slots=True)
class Common:
    """A file that is not written yet: its name, which follows from its content, and that.

    shapes: (vectors, length) of its tensors by key, in their order.
    """

    name: str
    content: bytes
    shapes: Mapping[str, Shape]

    @classmethod
    def of(cls, vectors: Mapping[str, Coded]) -> "Common":
        """That of vectors in codes, by the keys of their tensors; their draws are kept, as if it had been read."""
        shapes = {key: (coded.codes.shape[0], coded.codes.shape[1]) for key, coded in vectors.items()}
        content = save(to_file(vectors), {VECTORS: json.dumps(shapes)})
        found = cls(f"initialisation-{sha256(content).hexdigest()[:16]}.safetensors", content, shapes)
        hold(found.name, draws_of(coded.decode() for coded in vectors.values()))
        return found

    def write(self, directory: Path) -> Path:
        """Writes it, unless it is there and whole.

        :raises OutputError: when that fails.
        """
        path = directory / self.name
        if not is_intact(path):
            directory.mkdir(parents=True, exist_ok=True)
            replace_file(path, self.content)
        return path


def commons_in(directory: Path) -> list[Path]:
    """The files of a library's directory."""
    return sorted(path for path in directory.glob("initialisation-*.safetensors") if NAME.fullmatch(path.name))


def provide(layout: Layout, directory: Path) -> None:
    """Reads the file that a layout's codes are against, once a process, where there is one; it has to be there each time.

    :raises InputError: when it can't be found, or is damaged.
    """
    name = None if layout.origin is None else layout.origin.file
    if name is not None:
        path = found_from(directory, name)
        if not is_held(name):
            read_common(path)


def carry(name: str, source: Path, out: Path, inside: bool = False) -> None:
    """Sees to it that readers of `out` find a file of this name that those of `source` find, beside it if nowhere else.

    inside: in it, if nowhere else: a directory that may be moved by itself.

    :raises InputError: when it is not there, or damaged. :raises OutputError: when it can't be written.
    """
    path = found_from(source, name)
    if not any(is_intact(place / name) for place in _around(out)):
        read_common(path)
        replace_file((out if inside else out.parent) / name, path.read_bytes())


def needed_by(directory: Path) -> dict[str, Path]:
    """The file that an adapter's codes are against, by its name, where it lies elsewhere; nothing of any other directory.

    :raises InputError: when it is not there.
    """
    config = directory / CONFIG_NAME
    name = named_in(read_json(config)) if config.is_file() else None
    return {} if name is None or (directory / name).is_file() else {name: found_from(directory, name)}


def is_intact(path: Path) -> bool:
    """Whether a file is there and its content is what its name says."""
    try:
        now = path.stat()
        return _digest(path, now.st_size, now.st_mtime_ns)[:16] in path.name
    except OSError:
        return False


@lru_cache(1 << 8)
def _digest(path: Path, size: int, changed: int) -> str:
    """SHA-256 of a file as it is now: a library asks for its one file as often as it has adapters."""
    return sha256(path.read_bytes()).hexdigest()


def found_from(directory: Path, name: str) -> Path:
    """Where a file of this name is, seen from an adapter's directory.

    :raises InputError: when it is not there.
    """
    if NAME.fullmatch(name):
        for place in _around(directory):
            if (place / name).is_file():
                return place / name
    raise InputError(
        f"{directory}: its codes are against {name}, which lies beside the library that it comes from; copy it beside the "
        "adapter or above"
    )


def _around(directory: Path) -> list[Path]:
    """Where a reader of an adapter looks: in its directory and above, and above what that is a link to."""
    return list(dict.fromkeys([directory, *directory.absolute().parents, *directory.resolve().parents]))


def named_in(config: object) -> str | None:
    """The file that an adapter's configuration names, if its codes are against one; the configuration may say anything."""
    said = config.get("initialisation") if isinstance(config, dict) else None
    name = said.get("file") if isinstance(said, dict) else None
    return name if isinstance(name, str) and NAME.fullmatch(name) else None


def read_common(path: Path) -> tuple[str, dict[str, Shape]]:
    """Reads a file and keeps its draws; returns its name, and (vectors, length) of its tensors by key, in their order.

    :raises InputError: when it is damaged, or its content is not what its name says.
    """
    check_file(path)
    content = path.read_bytes()
    if not NAME.fullmatch(path.name) or sha256(content).hexdigest()[:16] not in path.name:
        raise InputError(
            f"{path}: its content is not what its name says; it is damaged: copy it again, or convert what names it again"
        )
    shapes, tensors = _parsed(content, path)
    if not is_held(path.name):
        named = [(f"{number}", shape) for number, shape in enumerate(shapes.values())]
        check_codes(tensors, named, torch.float32, path)
        hold(path.name, draws_of(decoded(tensors, named, torch.float32).values()))
    return path.name, shapes


def _parsed(content: bytes, path: Path) -> tuple[dict[str, Shape], dict[str, Tensor]]:
    """The shapes that the metadata in a file's header gives, and its tensors.

    :raises InputError: naming the file.
    """
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        said: Any = json.loads(header["__metadata__"][VECTORS])
        shapes = {str(name): (rank, width) for name, (rank, width) in said.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, SafetensorError):
        shapes, tensors = {}, {}
    sides = [side for shape in shapes.values() for side in shape]
    if not shapes or not all(type(side) is int and 0 < side < LARGEST_SIDE for side in sides):
        raise InputError(f"{path}: does not say which tensors it is of; it is damaged")
    return shapes, tensors


def draws_of(parts: Iterable[Tensor]) -> np.ndarray:
    """Rows (n, in) of each part as draws, one after another, int16."""
    found = []
    for rows in parts:
        largest = rows.abs().amax(1, keepdim=True).double().clamp_min(TINY)
        found.append((rows.double() / largest * (HALF - 1)).round().to(torch.int16).reshape(-1).numpy())
    return np.concatenate(found)
