"""Rows of A that are stored against A's random initialisation.

    A = T A₀ + R        T (r, r₀) and R (r, in) in codes, A₀ (r₀, in) = 2⁻¹⁵ · draws (`initialisation.stream`)

A row whose T has no bits is R alone, one whose R has none is T A₀. Products are taken in float64, so that every reader's numbers
are the same once they are rounded.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bslora_convert.bslora.codes.file import Start, check_codes, decoded
from bslora_convert.bslora.layout import Layout
from bslora_convert.initialisation.initial import Initial, read_initial
from bslora_convert.initialisation.stream import HALF
from bslora_convert.modules.factors import Shape

MIX = ".bslora_local_T"


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
    for name in [key.removesuffix(MIX) for key in found if key.endswith(MIX)]:
        mix, rest = found.pop(f"{name}{MIX}"), f"{name}.bslora_local_A"
        found[rest] = composed(mix, initial.draws[name].to(mix.device), found[rest])
    return {key: tensor.to(dtype) for key, tensor in found.items()}


def composed(mix: Tensor, base: Tensor, rest: Tensor) -> Tensor:
    """T A₀ + R, float32. mix (r, r₀), base (r₀, in) int16, rest (r, in)."""
    return torch.addmm(rest.double(), mix.double(), base.double(), alpha=1 / HALF).float()


def initial_of(layout: Layout, where: object) -> Initial | None:
    """The random initialisation that modules are stored against; None where there is none.

    :raises InputError: naming `where`, when the draws are not those of the layout's checksum.
    """
    if layout.origin is None:
        return None
    places = layout.initial
    return read_initial(layout.origin, places, {name: layout.modules[name].shape[1] for name in places}, where)
