"""One module's share of an adapter as the forward pass takes it: local factors, the transform, and uses of shared pairs."""

from collections.abc import Callable

import torch
from torch import Tensor

from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.transforms import Transform
from bslora_convert.modules.factors import Factors, Use

Parts = tuple[Factors, Transform | None, list[Use]]


def parts_of(layout: Layout, name: str, tensor: Callable[[str], Tensor]) -> Parts:
    """The parts of a module. tensor: gives a form's tensor by its key."""

    def pair(prefix: str) -> Factors:
        return Factors(tensor(f"{prefix}_B"), tensor(f"{prefix}_A"))

    own_names = layout.transform.own_names if layout.transform else ()
    uses: list[Use] = [
        (
            pair(f"{layout.owners[level, group]}.bslora_{level}"),
            {own: tensor(f"{name}.bslora_{level}_own_{own}") for own in own_names},
        )
        for level, group in layout.modules[name].groups.items()
    ]
    return pair(f"{name}.bslora_local"), layout.transform, uses


def laid_out(tensor: Tensor) -> Tensor:
    """The tensor as a new one would lie in memory, sides of one too, so that products of it are the same to the last bit."""
    return tensor.contiguous().view(-1).view(tensor.shape)


class Moved:
    """Tensors on a device, each moved once: what modules share stays shared."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        """dtype: that they get, contiguous; where None float32 at least, and a tensor that is there already stays itself."""
        self._dtype = dtype
        self._seen: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor there."""
        key = id(tensor), device
        if key not in self._seen:
            if self._dtype is None:
                there = tensor.to(device, torch.promote_types(tensor.dtype, torch.float32))
            else:
                there = laid_out(tensor.to(device, self._dtype))
            self._seen[key] = tensor, there  # the first too, so that its id stays its own
        return self._seen[key][1]
