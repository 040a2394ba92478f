"""What trained tensors are once they are stored: rounded to a dtype, or in codes of the widths that they began with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bslora_convert.bslora.codes.coded import Coded, from_vectors, to_vectors
from bslora_convert.bslora.codes.file import to_file
from bslora_convert.coding.encode import Encoded, encode
from bslora_convert.fit.parallel import each, modules_over_cores


@dataclass(frozen=True, slots=True)
class Quantiser:
    """The dtype that readers get, and the codes that the adapter began with, by key; empty where it holds floats."""

    dtype: torch.dtype
    start: Mapping[str, Coded] = field(default_factory=dict)

    def round(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each trained tensor as it is read back, by key."""
        if not self.start:
            return {key: tensor.to(self.dtype) for key, tensor in trained.items()}
        return {
            key: from_vectors(key, found.decode(), trained[key].shape).to(trained[key].device, self.dtype)
            for key, found in self._coded(trained).items()
        }

    def encoded(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The file's code tensors, as many bytes as those that it began with; nothing where floats are stored."""
        if not self.start:
            return {}
        return to_file({**self.start, **{key: found.coded for key, found in self._coded(trained).items()}})

    def _coded(self, trained: Mapping[str, Tensor]) -> dict[str, Encoded]:
        def code(key: str) -> Encoded:
            start = self.start[key]
            return encode(to_vectors(key, trained[key].detach().cpu()), start.widths.tolist(), start.scales, True)

        with modules_over_cores():
            return dict(zip(trained, each(code, trained), strict=True))
