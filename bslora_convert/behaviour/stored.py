"""What trained tensors are once they are stored: rounded to a dtype, or in codes of the widths that they began with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bslora_convert.bslora.coding.coded import Coded, from_vectors, to_vectors
from bslora_convert.bslora.coding.file import to_file, widths_of
from bslora_convert.bslora.layout import Layout
from bslora_convert.fit.quantize import encode


@dataclass(frozen=True, slots=True)
class Stored:
    """The dtype that readers get, and the codes that the adapter began with; empty where it holds floats."""

    layout: Layout
    dtype: torch.dtype
    codes: Mapping[str, Tensor] = field(default_factory=dict)

    def round(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each tensor as it is read back, by key."""
        if not self.codes:
            return {key: tensor.to(self.dtype) for key, tensor in tensors.items()}
        return {
            key: from_vectors(key, coded.decode(), tensors[key].shape).to(tensors[key].device, self.dtype)
            for key, coded in self._coded(tensors).items()
        }

    def encoded(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's code tensors, as many bytes as those that it began with; nothing where floats are stored."""
        return to_file(self._coded(tensors)) if self.codes else {}

    def _coded(self, tensors: Mapping[str, Tensor]) -> dict[str, Coded]:
        widths = widths_of(self.codes, self.layout.tensors())
        return {key: encode(to_vectors(key, tensors[key].detach()), widths[key]) for key in widths}
