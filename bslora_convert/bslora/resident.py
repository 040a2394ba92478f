"""One adapter on a model as the codes of its file, decoded when it is used.

The codes are buffers, so they go where the model goes; they are held as whole numbers, which no `half()` rounds. What is decoded
is counted by `Decoded`, which all adapters of a model share. Where it has room the whole adapter is decoded at once, shared pairs
once for all modules; where it has none, the module that is asked for, and nothing is kept.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bslora_convert.bslora.codes.coded import SCALES
from bslora_convert.bslora.codes.composed import decoded_form
from bslora_convert.bslora.codes.file import (
    FLOATS_NAME,
    NAMES,
    SCALES_NAME,
    WIDTHS_NAME,
    Start,
    check_codes,
    starts,
)
from bslora_convert.bslora.codes.widths import WIDTHS
from bslora_convert.bslora.decoded import Decoded
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.parts import Moved, Parts, parts_of
from bslora_convert.errors import InputError
from bslora_convert.modules.factors import Shape

RESIDENT = ("codes", "floats")  # what an adapter that comes in codes may be held as
HALVES = (SCALES_NAME, FLOATS_NAME)  # in bfloat16


class Resident(nn.Module):
    """An adapter in codes: `parts` gives a module's factors.

    Factors are in the dtype of `like`, an empty tensor that is moved and cast as the model is, each on the device of its layer.
    """

    like: Tensor

    def __init__(
        self,
        layout: Layout,
        stored: torch.dtype,
        cache: Decoded,
        device_of: Callable[[str], torch.device],
        names: Mapping[str, str] | None = None,
    ) -> None:
        """layout: as the file has it. stored: what numbers are rounded to as they are decoded.

        device_of: where a module's layer is. names: of the modules in the file by those that the model has, where they differ.
        """
        super().__init__()
        self.layout = layout
        self._stored, self._cache, self._device_of = stored, cache, device_of
        self._names, self._apart = names, _apart()
        self._parts: dict[str, Parts] = {}
        self._starts: tuple[dict[str, int], Tensor] | None = None  # as tensors: a thousand adapters may need theirs
        held = (shape for name in layout.modules for shape in layout.held_by(name).values())
        self._numbers = sum(rows * columns for rows, columns in held)
        self.register_buffer("like", torch.empty(0, dtype=torch.float32), persistent=False)

    def fill(self, codes: Mapping[str, Tensor], what: object) -> None:
        """Takes the tensors of a file, which are copied.

        :raises InputError: naming `what`, when they are damaged.
        """
        codes = {name: tensor.detach().cpu() for name, tensor in codes.items()}
        check_codes(codes, self.layout.stored(), self._stored, what, self.layout.initial)
        self._cache.drop(self)
        self._starts = None
        for name in NAMES:
            self._buffers.pop(name, None)
        for name, tensor in codes.items():
            whole = tensor.view(torch.int16) if name in HALVES else tensor
            self.register_buffer(name, whole.to(self.like.device, copy=True))

    @property
    def codes(self) -> dict[str, Tensor]:
        """The tensors of the file, in the memory that they are held in."""
        held = {name: self._buffers[name] for name in NAMES if name in self._buffers}
        return {
            name: tensor.view(SCALES) if name in HALVES else tensor
            for name, tensor in held.items()
            if tensor is not None
        }

    @property
    def codes_bytes(self) -> int:
        """Bytes of the codes."""
        return sum(tensor.nbytes for tensor in self.codes.values())

    @property
    def decoded_bytes(self) -> int:
        """Bytes of all its numbers once they are decoded, shared ones once."""
        return self._numbers * self.like.itemsize

    @property
    def is_filled(self) -> bool:
        """Whether its codes have been loaded."""
        return WIDTHS_NAME in self._buffers

    @property
    def is_decoded(self) -> bool:
        """Whether its numbers are held."""
        return bool(self._parts)

    def holds(self, name: str) -> bool:
        """Whether it changes a module, by the name that the model has for it."""
        return name in (self.layout.modules if self._names is None else self._names)

    def parts(self, name: str) -> Parts:
        """A module's parts, by the name that the model has for it.

        :raises InputError: when the codes have not been loaded.
        """
        found = self._parts.get(name)
        if found is None:
            return self._apart(self, name)
        if not torch.compiler.is_compiling():  # a graph that changes a count would be compiled anew at each step
            self._cache.used(self)
        return found

    def ready(self) -> None:
        """Decodes it where there is room, before it is used: what is compiled then finds it so."""
        if not self._parts:
            self._decode()

    def forget(self) -> None:
        """Lets go of what is decoded; the cache calls it."""
        self._parts = {}

    def leave(self) -> None:
        """Lets go of all that is held outside of it."""
        self._cache.remove(self)

    def _read(self, name: str) -> Parts:
        return self._parts[name] if self._decode() else self._one(name)

    def _decode(self) -> bool:
        """Decodes all of it; False where there is no room for it."""
        if not self.is_filled:
            raise InputError(
                "the adapter's codes were not loaded: transformers' own load_adapter can't, PeftModel.from_pretrained does"
            )
        if not self._cache.take(self):
            return False
        self._starts = None
        try:
            self._parts = self._whole()
        except BaseException:
            self._cache.drop(self)
            raise
        return True

    def _whole(self) -> dict[str, Parts]:
        with torch.inference_mode(False), torch.no_grad():
            tensors = decoded_form(self.codes, self.layout, self._stored)
            moved = Moved(self.like.dtype)
            return {name: self._put(name, tensors.__getitem__, moved) for name in self._names or self.layout.modules}

    def _one(self, name: str) -> Parts:
        """The parts of one module, read from where they begin in the file: what it holds, and the pairs that others own."""
        own = self._names[name] if self._names else name
        with torch.inference_mode(False), torch.no_grad():
            tensors = self._run(self._tensors_of(own), self._start(own))
            for level, group in self.layout.modules[own].groups.items():
                owner = self.layout.owners[level, group]
                if owner != own:
                    held, start = self._tensors_of(owner), self._start(owner)
                    first = [key for key, _ in held].index(f"{owner}.bslora_{level}_A")
                    *_, start = starts(self.codes[WIDTHS_NAME], held[:first], start)
                    tensors |= self._run(held[first : first + 2], start)
            return self._put(name, tensors.__getitem__, Moved(self.like.dtype))

    def _run(self, held: Sequence[tuple[str, Shape]], start: Start) -> dict[str, Tensor]:
        """Tensors that follow each other in the file."""
        return decoded_form(self.codes, self.layout, self._stored, held, start, self._numbers)

    def _start(self, module: str) -> Start:
        """Where the file's tensors of a module begin."""
        if self._starts is None:
            rows, start, widths = [], Start(), self.codes[WIDTHS_NAME].cpu()
            for name in self.layout.modules:
                rows.append([start.vector, start.scale, *(start.numbers.get(width, 0) for width in WIDTHS)])
                *_, start = starts(widths, self._tensors_of(name), start)
            self._starts = {name: row for row, name in enumerate(self.layout.modules)}, torch.tensor(rows)
        places, table = self._starts
        vector, scale, *numbers = table[places[module]].tolist()
        return Start(vector, scale, dict(zip(WIDTHS, numbers, strict=True)))

    def _tensors_of(self, module: str) -> list[tuple[str, Shape]]:
        return [(f"{module}.bslora_{name}", shape) for name, shape in self.layout.stored_by(module).items()]

    def _put(self, name: str, tensor: Callable[[str], Tensor], moved: Moved) -> Parts:
        device = self._device_of(name)
        return parts_of(self.layout, self._names[name] if self._names else name, lambda key: moved(tensor(key), device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Resident":
        self._cache.drop(self)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._cache.drop(self)


@cache
def _apart() -> Callable[[Resident, str], Parts]:
    """`Resident._read`, which no graph is made of; the compiler is loaded with the first adapter, not with this page."""
    found: Callable[[Resident, str], Parts] = torch.compiler.disable(Resident._read)
    return found
