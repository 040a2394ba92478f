"""One GGUF file: `<name>.lora_a` (r, in) and `<name>.lora_b` (out, r) of every module, by the base's own names.

llama.cpp multiplies B A by alpha / (the tensor's own rank), and by nothing where `adapter.lora.alpha` is 0: that is what is
written, so every module keeps its own rank. In q8_0 32 numbers of a row share a scale; rows of B have r numbers, and where those
are no multiple of 32 B is f16.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bslora_convert.errors import InputError, Refused
from bslora_convert.modules.factors import Factors
from bslora_convert.serving.gguf.models import Base

GGUF_NAME = "adapter.gguf"
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "q8_0": "Q8_0"}  # as ggml calls them
FILE_TYPES = {"float32": "ALL_F32", "bfloat16": "MOSTLY_BF16", "float16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}
BLOCK = 32  # numbers of q8_0 that share a scale
SIDES = ("lora_a", "lora_b")


def write_gguf(path: Path, modules: Mapping[str, Factors], base: Base, dtype: str) -> None:
    """Writes an adapter for a base model. dtype: one of `DTYPES`.

    :raises Refused: for a module that the architecture has no name for, or numbers that the dtype can't hold.
    """
    import gguf

    names = names_of(modules, base)
    writer = gguf.GGUFWriter(path, base.architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_file_type(getattr(gguf.LlamaFileType, FILE_TYPES[dtype]))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)
    for module, factors in modules.items():
        for side, tensor in zip(SIDES, (factors.a, base.turned(module, factors.b)), strict=True):
            kind = "float16" if dtype == "q8_0" and tensor.shape[1] % BLOCK else dtype
            _add(writer, f"{names[module]}.{side}", tensor, kind, module)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, modules: Iterable[str], base: Base) -> dict[str, Factors]:
    """The modules of a file that was written for this base, in float32."""
    import gguf
    import numpy as np

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    read = {}
    for module, name in names_of(modules, base).items():
        a, b = (
            torch.from_numpy(
                np.array(gguf.dequantize(found[f"{name}.{side}"].data, found[f"{name}.{side}"].tensor_type))
            )
            for side in SIDES
        )
        read[module] = Factors(base.unturned(module, b), a)
    return read


def names_of(modules: Iterable[str], base: Base) -> dict[str, str]:
    """What the base's file calls the weights of these modules.

    :raises Refused: naming the first that it has none for.
    """
    import gguf

    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(numbers[base.architecture.name], base.layers)
    names: dict[str, str] = {}
    for module in modules:
        name = table.get_name(module)
        if name is None:
            raise Refused(
                f"{module}: a model of llama.cpp's architecture {base.architecture.name} with {base.layers} layers has no such "
                "module; another base was meant, or llama.cpp can't adapt it"
            )
        if name == "output" and base.tied:
            raise Refused(f"{module}: the base's head is its embedding, which llama.cpp does not adapt as a head")
        names[module] = f"{name}.weight"
    return names


def _add(writer: Any, name: str, tensor: Tensor, dtype: str, module: str) -> None:
    import gguf

    numbers = tensor.to(torch.float32)
    held = numbers.to(torch.float16) if dtype in ("float16", "q8_0") else numbers
    if not torch.isfinite(held).all():
        raise Refused(
            f"{module}: its largest number {numbers.abs().max():.3g} is more than {dtype} holds; give another --dtype"
        )
    kind = getattr(gguf.GGMLQuantizationType, DTYPES[dtype])
    try:
        data = gguf.quantize(numbers.contiguous().numpy(), kind)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{module}: can't be written as {dtype} ({error})") from error
    writer.add_tensor(name, data, raw_dtype=kind)
