"""What trained tensors are once they are stored: rounded to a dtype, or in codes of the widths that they began with."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bslora_convert.bslora.codes.coded import Coded, from_vectors, to_vectors
from bslora_convert.bslora.codes.file import to_file
from bslora_convert.bslora.layout import MIX
from bslora_convert.coding.encode import CodedRows, Encoded, code_rows, encode
from bslora_convert.fit.parallel import each, modules_over_cores
from bslora_convert.initialisation.initial import Initial


@dataclass(frozen=True, slots=True)
class Quantiser:
    """The dtype that readers get, and the codes that the adapter began with, by key; empty where it holds floats.

    initial: the random initialisation that they are against, if any.
    """

    dtype: torch.dtype
    start: Mapping[str, Coded] = field(default_factory=dict)
    initial: Initial | None = None

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
        found: dict[str, Coded] = dict(self.start)
        for key, coded in self._coded(trained).items():
            found |= {key: coded.coded} if isinstance(coded, Encoded) else coded.tensors(key)
        return to_file(found)

    def _coded(self, trained: Mapping[str, Tensor]) -> dict[str, Encoded | CodedRows]:
        def code(key: str) -> Encoded | CodedRows:
            start, vectors = self.start[key], to_vectors(key, trained[key].detach().cpu())
            mix = self.start.get(f"{key}{MIX}")
            if mix is None or self.initial is None:
                return encode(vectors, start.widths.tolist(), start.scales, True)
            widths = list(zip(mix.widths.tolist(), start.widths.tolist(), strict=True))
            base = self.initial.base(*key.rsplit(".bslora_local_", 1))
            return code_rows(vectors, widths, base, True, (mix.scales, start.scales))

        with modules_over_cores():
            return dict(zip(trained, each(code, trained), strict=True))
