"""Updates on a parameter that stacks experts, while a forward pass runs: nothing of the model is replaced."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bslora_convert.layers.names import StackSlice


class _Added(nn.Module):
    """A parameter with updates on some of its slices."""

    def __init__(self, deltas: Mapping[StackSlice, Tensor]) -> None:
        super().__init__()
        self.deltas = deltas

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter (experts, parts · out, in), or a matrix (out, in), with the updates in place."""
        total = torch.zeros(weight.shape, dtype=next(iter(self.deltas.values())).dtype, device=weight.device)
        for place, delta in self.deltas.items():
            rows_of(total, place).add_(delta.to(weight.device))
        return (weight.to(total.dtype) + total).to(weight.dtype)


def rows_of(weight: Tensor, place: StackSlice) -> Tensor:
    """One expert's part of a stacked parameter as a view: (out, in)."""
    if place.expert is None:
        return weight
    if place.transposed:
        return weight[place.expert].T
    rows = weight.shape[1] // place.parts
    return weight[place.expert, place.part * rows : (place.part + 1) * rows]


@contextmanager
def added(holder: nn.Module, deltas: Mapping[StackSlice, Tensor]) -> Iterator[None]:
    """Inside of it the holder's parameters have these updates, (out, in) each."""
    by_parameter: dict[str, dict[StackSlice, Tensor]] = {}
    for place, delta in deltas.items():
        by_parameter.setdefault(place.parameter, {})[place] = delta
    begun: list[str] = []
    try:
        for name, of in by_parameter.items():
            needed = holder.get_parameter(name).requires_grad
            parametrize.register_parametrization(holder, name, _Added(of))
            begun.append(name)
            holder.parametrizations[name].original.requires_grad_(needed)  # type: ignore[index,union-attr]
        with parametrize.cached():
            yield
    finally:
        for name in begun:
            parametrize.remove_parametrizations(holder, name, leave_parametrized=False)
