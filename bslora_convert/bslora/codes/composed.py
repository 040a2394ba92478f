"""Vectors that are stored against what they were before training: rows of A, mostly their random initialisation, columns of B.

    X = T X₀ + R        T (r, r₀) and R (r, n) in codes, X₀ (r₀, n) = 2⁻¹⁵ · draws (`initialisation.stream`)

A vector whose T has no bits is R's alone, one whose R has none is T's. Products are taken in float64, so that every reader's
numbers are the same once they are rounded.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bslora_convert.bslora.codes.coded import from_vectors, to_vectors
from bslora_convert.bslora.codes.file import Start, check_codes, decoded
from bslora_convert.bslora.layout import MIX, Layout
from bslora_convert.initialisation.initial import Initial, read_initial
from bslora_convert.initialisation.stream import HALF
from bslora_convert.modules.factors import Shape


def from_file(tensors: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype, where: object) -> dict[str, Tensor]:
    """The form's tensors in `dtype`, by key.

    :raises InputError: when a tensor is missing, left over, or not what layout and widths ask for.
    """
    check_codes(tensors, layout.stored(), dtype, where, layout.initial)
    return decoded_form(tensors, layout, dtype)


def decoded_form(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    dtype: torch.dtype,
    shapes: Sequence[tuple[str, Shape]] | None = None,
    start: Start | None = None,
    among: int = 0,
) -> dict[str, Tensor]:
    """Tensors of the form in `dtype`, by key, on the device of their codes, which `check_codes` has seen.

    shapes: of tensors that follow each other in the file, whole modules or pairs; all of them where None. start, among: as of
    `codes.file.decoded`.
    """
    held = list(layout.stored()) if shapes is None else shapes
    if layout.origin is None:
        return decoded(tensors, held, dtype, start, among)
    found = decoded(tensors, held, torch.float32, start, among)
    initial = initial_of(layout, "the codes")
    assert initial is not None  # there is an origin
    for key in [key.removesuffix(MIX) for key in found if key.endswith(MIX)]:
        mix, rest = found.pop(f"{key}{MIX}"), to_vectors(key, found[key])
        whole = composed(mix, initial.draws[key].to(mix.device), rest)
        found[key] = from_vectors(key, whole, tuple(found[key].shape))
    return {key: tensor.to(dtype) for key, tensor in found.items()}


def composed(mix: Tensor, base: Tensor, rest: Tensor) -> Tensor:
    """T X₀ + R, float32. mix (r, r₀), base (r₀, n) int16, rest (r, n)."""
    return torch.addmm(rest.double(), mix.double(), base.double(), alpha=1 / HALF).float()


def initial_of(layout: Layout, where: object) -> Initial | None:
    """What tensors are stored against; None where there is nothing.

    :raises InputError: naming `where`, when the draws are not those of the layout's checksum.
    """
    if layout.origin is None:
        return None
    return read_initial(layout.origin, layout.initial, layout.initial_lengths, where)
