"""An initialisation that adapters have in common, as a file beside a library: `initialisation-<hash>.safetensors`.

    metadata        `vectors`: JSON, by key of a tensor (`<module>.bslora_local_A`) how many vectors and how long, in their order
    bslora_widths, bslora_scales, bslora_trellis_<w>        codes of all of these, rows of A₀ and columns of B₀ (`codes.file`)

Vector by vector the decoded numbers x become draws, round((2¹⁵ − 1) x / max |x|) in 16 bits; its scale is left to each adapter.
A place's first draw counts from the beginning of the file. Adapters name the file and no path; readers look for it beside the
adapter and in the directories above.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from re import compile as pattern
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from bslora_convert.bslora.codes.coded import Coded
from bslora_convert.bslora.codes.file import check_codes, decoded, to_file
from bslora_convert.bslora.layout import LARGEST_SIDE, Layout
from bslora_convert.errors import InputError
from bslora_convert.files.landing import replace_file
from bslora_convert.files.tensorfile import read_metadata, read_tensors
from bslora_convert.initialisation.kept import hold, is_held
from bslora_convert.initialisation.stream import HALF
from bslora_convert.modules.factors import Shape

VECTORS = "vectors"
NAME = pattern(r"initialisation-[0-9a-f]{16}\.safetensors")
ABOVE = 8  # directories in which a reader looks
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
        """Writes it, unless it is there.

        :raises OutputError: when that fails.
        """
        path = directory / self.name
        if not path.is_file():
            replace_file(path, self.content)
        return path


def commons_in(directory: Path) -> list[Path]:
    """The files of a library's directory."""
    return sorted(path for path in directory.glob("initialisation-*.safetensors") if NAME.fullmatch(path.name))


def provide(layout: Layout, directory: Path) -> None:
    """Reads the file that a layout's codes are against, once a process, where there is one.

    :raises InputError: when it can't be found, or is damaged.
    """
    name = None if layout.origin is None else layout.origin.file
    if name is not None and not is_held(name):
        read_common(found_from(directory, name))


def found_from(directory: Path, name: str) -> Path:
    """Where a file of this name is, seen from an adapter's directory.

    :raises InputError: when it is not there.
    """
    if NAME.fullmatch(name):
        for place in [directory, *list(directory.absolute().parents)[:ABOVE]]:
            if (place / name).is_file():
                return place / name
    raise InputError(
        f"{directory}: its codes are against {name}, which lies beside the library that it comes from; copy it beside the "
        "adapter or above"
    )


def named_in(config: object) -> str | None:
    """The file that an adapter's configuration names, if its codes are against one; the configuration may say anything."""
    said = config.get("initialisation") if isinstance(config, dict) else None
    name = said.get("file") if isinstance(said, dict) else None
    return name if isinstance(name, str) and NAME.fullmatch(name) else None


def read_common(path: Path) -> tuple[str, dict[str, Shape]]:
    """Reads a file and keeps its draws; returns its name, and (vectors, length) of its tensors by key, in their order.

    :raises InputError: when it is damaged, or its content is not what its name says.
    """
    if not NAME.fullmatch(path.name) or sha256(path.read_bytes()).hexdigest()[:16] not in path.name:
        raise InputError(f"{path}: its content is not what its name says; it is damaged, copy it again")
    shapes = _shapes(read_metadata(path).get(VECTORS, ""), path)
    if not is_held(path.name):
        named = [(f"{number}", shape) for number, shape in enumerate(shapes.values())]
        tensors = read_tensors(path)
        check_codes(tensors, named, torch.float32, path)
        hold(path.name, draws_of(decoded(tensors, named, torch.float32).values()))
    return path.name, shapes


def _shapes(text: str, path: Path) -> dict[str, Shape]:
    """The shapes that a file's metadata gives.

    :raises InputError: naming the file.
    """
    try:
        said: Any = json.loads(text)
        shapes = {str(name): (rank, width) for name, (rank, width) in said.items()}
    except (ValueError, TypeError, AttributeError):
        shapes = {}
    sides = [side for shape in shapes.values() for side in shape]
    if not shapes or not all(type(side) is int and 0 < side < LARGEST_SIDE for side in sides):
        raise InputError(f"{path}: does not say which tensors it is of; it is damaged")
    return shapes


def draws_of(parts: Iterable[Tensor]) -> np.ndarray:
    """Rows (n, in) of each part as draws, one after another, int16."""
    found = []
    for rows in parts:
        largest = rows.abs().amax(1, keepdim=True).double().clamp_min(TINY)
        found.append((rows.double() / largest * (HALF - 1)).round().to(torch.int16).reshape(-1).numpy())
    return np.concatenate(found)
