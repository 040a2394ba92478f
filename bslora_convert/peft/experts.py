"""Compact adapters of single experts on a layer that stacks its experts.

Under transformers 5 a layer's experts are two parameters. Here each adapted expert keeps a layer of its own, named as if
the experts were modules, whose weight is a view of its share of the parameter; updates are on the parameter while it runs.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from bslora_convert.layers.names import Place, StackSlice
from bslora_convert.layers.stacked import added, rows_of
from bslora_convert.peft.layer import BsloraLayer
from bslora_convert.peft.table import AdapterTable


class ExpertWeight(nn.Module):
    """One expert's share of a stacked parameter as if it were a linear layer: weight (out, in)."""

    def __init__(self, holder: nn.Module, place: StackSlice) -> None:
        super().__init__()
        self._held = (holder,)  # a tuple, so that the holder is registered once, where it stands
        self.place = place
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:
        """A view of the parameter's numbers."""
        return rows_of(self._held[0].get_parameter(self.place.parameter).data, self.place)


class ExpertLayer(BsloraLayer):
    """Compact adapters of one expert's projection."""

    is_expert = True

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Writes into the stacked parameter."""
        cast(ExpertWeight, self.get_base_layer()).weight.copy_(weight_data)

    @property
    def place(self) -> StackSlice:
        """Which share of which parameter it adapts."""
        return cast(ExpertWeight, self.get_base_layer()).place

    def update(self) -> Tensor | None:
        """The active adapters' updates together, (out, in); None where nothing is to be added."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return None
        names = [] if self.merged else [name for name in self.active_adapters if self.holds(name)]
        deltas = [self.get_delta_weight(name) for name in names]
        return torch.stack(deltas).sum(0) if len(deltas) > 1 else deltas[0] if deltas else None


class BsloraExperts(nn.Module):
    """The layer that holds stacked experts, and their compact adapters."""

    def __init__(self, base_layer: nn.Module, table: AdapterTable) -> None:
        """base_layer: stays as it is. table: of all layers of the model."""
        super().__init__()
        self.base_layer = base_layer
        self._table = table

    def layer(self, place: Place) -> ExpertLayer:
        """The layer of one expert's projection, made when the first adapter needs it: `experts.3.w1`, or `gate.weight`."""
        assert place.slice is not None  # that is what the experts are here for
        *path, last = place.child
        parent: nn.Module = self
        for part in path:
            if part not in parent._modules:
                parent.register_module(part, nn.Module())
            parent = cast(nn.Module, parent._modules[part])
        if last not in parent._modules:
            weight = ExpertWeight(self.base_layer, place.slice)
            parent.register_module(last, ExpertLayer(weight, place.name, self._table))
        return cast(ExpertLayer, parent._modules[last])

    def layers(self) -> list[ExpertLayer]:
        """Every expert's projections that are adapted."""
        return [module for module in self.modules() if isinstance(module, ExpertLayer)]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base layer makes of its parameters with the active adapters' updates."""
        updates = {layer.place: update for layer in self.layers() if (update := layer.update()) is not None}
        with added(self.base_layer, updates):
            return self.base_layer(*args, **kwargs)

    def get_base_layer(self) -> nn.Module:
        """The layer that was wrapped."""
        return self.base_layer

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer, with the adapters added to its parameters if asked for."""
        for layer in self.layers() if merge else ():
            layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer
