"""What the layers of one model hold in common: adapters in codes, and where shared pairs are registered."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from bslora_convert.bslora.decoded import Decoded
from bslora_convert.bslora.resident import Resident
from bslora_convert.layers.names import Place
from bslora_convert.modules.factors import Factors


class SharingLayer(Protocol):
    """A layer with adapters, as others of the model ask it."""

    def placed(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and dtype of its base weight."""

    def pair(self, level: str, adapter_name: str) -> Factors:
        """A shared pair that is registered in it."""

    def fill(self, adapter_name: str, tensors: Mapping[str, Tensor], autocast: bool) -> None:
        """Takes an adapter's tensors."""


@dataclass(slots=True)
class Owner:
    """Where a shared pair is registered; the layer is known once it has been met."""

    layer: SharingLayer | None = None


@dataclass(slots=True)
class AdapterTable:
    """What all layers of a model share: the adapters held as codes, what of them is decoded, the layers by name.

    places: where the model has an adapter's modules, by what was asked, so that the next one like it need not look.
    """

    adapters: dict[str, Resident] = field(default_factory=dict)
    decoded: Decoded = field(default_factory=Decoded)
    layers: dict[str, SharingLayer] = field(default_factory=dict)
    places: dict[Hashable, dict[str, Place]] = field(default_factory=dict)

    def device_of(self, name: str) -> torch.device:
        """Where a layer's base weight is."""
        return self.layers[name].placed()[0] or torch.device("cpu")
