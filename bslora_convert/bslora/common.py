"""An initialisation that adapters have in common, as a file beside a library: `initialisation-<hash>.safetensors`.

    metadata                 `modules`: JSON, the shape (r, in) of A₀ by name, in the order in which they stand
    bslora_widths, _scales, _trellis_<w>   codes of all rows of these (`codes.file`)

Row by row the decoded numbers x become draws, round((2¹⁵ − 1) x / max |x|) in 16 bits; its scale is left to T of each adapter.
A place's first draw counts from the beginning of the file. Adapters name the file and no path; readers look for it beside the
adapter and in the directories above.
"""

import json
from collections.abc import Iterable, Mapping
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

MODULES = "modules"
NAME = pattern(r"initialisation-[0-9a-f]{16}\.safetensors")
ABOVE = 8  # directories in which a reader looks
TINY = 1e-30


def common_bytes(rows: Mapping[str, Coded]) -> bytes:
    """The file of modules' rows in codes."""
    shapes = {name: list(coded.codes.shape) for name, coded in rows.items()}
    return save(to_file(rows), {MODULES: json.dumps(shapes)})


def write_common(directory: Path, content: bytes) -> Path:
    """Writes a file's content under the name that follows from it.

    :raises OutputError: when that fails.
    """
    path = directory / f"initialisation-{sha256(content).hexdigest()[:16]}.safetensors"
    replace_file(path, content)
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
    """Reads a file and keeps its draws; returns its name, and the shapes of its modules in their order.

    :raises InputError: when it is damaged, or its content is not what its name says.
    """
    if not NAME.fullmatch(path.name) or sha256(path.read_bytes()).hexdigest()[:16] not in path.name:
        raise InputError(f"{path}: its content is not what its name says; it is damaged, copy it again")
    shapes = _shapes(read_metadata(path).get(MODULES, ""), path)
    if not is_held(path.name):
        named = [(f"{name}.bslora_local_A", shape) for name, shape in shapes.items()]
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
        raise InputError(f"{path}: does not say which modules it is of; it is damaged")
    return shapes


def draws_of(parts: Iterable[Tensor]) -> np.ndarray:
    """Rows (n, in) of each part as draws, one after another, int16."""
    found = []
    for rows in parts:
        largest = rows.abs().amax(1, keepdim=True).double().clamp_min(TINY)
        found.append((rows.double() / largest * (HALF - 1)).round().to(torch.int16).reshape(-1).numpy())
    return np.concatenate(found)
