"""A form on a model through forward hooks: no PEFT, nothing replaced, and taken off again without a trace."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, cast
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bslora_convert.bslora.decoded import Decoded
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.forward import add_head, add_lookup, add_update, dense
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.parts import Moved, Parts, parts_of
from bslora_convert.bslora.resident import RESIDENT, Resident
from bslora_convert.bslora.storage import CodedAdapter, load_coded, load_compact
from bslora_convert.bslora.tensors import named_tensors
from bslora_convert.errors import InputError
from bslora_convert.layers.names import Place, StackSlice, is_input_embedding, places, tied_heads
from bslora_convert.layers.shapes import check_fits
from bslora_convert.layers.stacked import added
from bslora_convert.lora.tables import Rows, with_rows
from bslora_convert.recipe.checks import check_choice

_decoded: WeakKeyDictionary[nn.Module, Decoded] = WeakKeyDictionary()


class Attached:
    """An adapter on a model. `enabled` switches it; `remove` takes it off; as a context it is on only inside."""

    def __init__(
        self,
        model: nn.Module,
        form: BsloraForm | CodedAdapter,
        carried: Mapping[str, Tensor | Rows],
        what: object,
        enabled: bool = True,
    ) -> None:
        """Hooks a form's modules and holds the tensors that replace the model's own. What is in codes stays so (`decoded_of`).

        :raises InputError: when the model is not the one that the adapter was made for.
        """
        layout = form.layout if isinstance(form, CodedAdapter) else Layout.of(form)
        found = check_fits(layout.modules, model, what)
        self.carried = carried
        owners = {name: _owner(name) for name in carried}
        known = places(owners.values(), model)
        self._swaps = [
            _swap(model, known[owners[name]].name if owners[name] in known else owners[name], name, tensor, what)
            for name, tensor in carried.items()
        ]
        self._enabled = False
        self.resident: Resident | None = None
        parts_by_name = (
            self._in_codes(model, form, found, what)
            if isinstance(form, CodedAdapter)
            else _in_floats(form, model, found)
        )
        self._handles: list[RemovableHandle] = []
        stacks: dict[str, dict[StackSlice, Callable[[], Parts]]] = {}
        for name, module in layout.modules.items():
            place, layer = found[name], model.get_submodule(found[name].layer)
            parts = partial(parts_by_name, name)
            if place.slice is not None:
                stacks.setdefault(place.slice.holder, {})[place.slice] = parts
                continue
            scale = getattr(layer, "embed_scale", None)
            add = add_update if module.kind == "linear" else partial(add_lookup, scale=scale)
            self._handles.append(layer.register_forward_hook(self._hook(add, parts)))
            if module.kind == "tied_embedding" and is_input_embedding(model, layer):
                heads = [head for head_name, head in tied_heads(model).items() if head_name not in layout.modules]
                self._handles += [head.register_forward_hook(self._hook(add_head, parts)) for head in heads]
        for holder, of in stacks.items():
            self._handles += self._stack(model.get_submodule(holder), of)
        self.enabled = enabled

    @property
    def enabled(self) -> bool:
        """Whether the adapter takes part in the forward pass."""
        return self._enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        if value != self._enabled:
            self._swaps = [swap() for swap in self._swaps]
        self._enabled = value

    def remove(self) -> None:
        """Takes the adapter off; the model is as it was."""
        self.enabled = False
        for handle in self._handles:
            handle.remove()
        if self.resident is not None:
            self.resident.leave()

    def __enter__(self) -> "Attached":
        self.enabled = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.enabled = False

    def _in_codes(
        self, model: nn.Module, adapter: CodedAdapter, found: Mapping[str, Place], what: object
    ) -> Callable[[str], Parts]:
        layers = {name: ref(model.get_submodule(place.layer)) for name, place in found.items()}

        def device_of(name: str) -> torch.device:  # holds no model, which is let go with its adapters on it
            return _device(cast(nn.Module, layers[name]()))

        self.resident = Resident(adapter.layout, adapter.dtype, decoded_of(model), device_of)
        self.resident.to(device_of(next(iter(found))), torch.promote_types(adapter.dtype, torch.float32))
        self.resident.fill(adapter.codes, what)
        return self.resident.parts

    def _hook(self, add: Callable[..., Tensor], parts: Callable[[], Parts]) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return add(output, inputs[0], *parts()) if self._enabled else output

        return hook

    def _stack(self, holder: nn.Module, of: Mapping[StackSlice, Callable[[], Parts]]) -> list[RemovableHandle]:
        """Hooks around the layer that holds stacked experts: their updates are on its parameters while it runs."""
        running: list[AbstractContextManager[None]] = []

        def before(*_: Any) -> None:
            if self._enabled:
                running.append(added(holder, {place: dense(*parts()) for place, parts in of.items()}))
                running[-1].__enter__()

        def after(*_: Any) -> None:
            if running:
                running.pop().__exit__(None, None, None)

        return [holder.register_forward_pre_hook(before), holder.register_forward_hook(after, always_call=True)]


def load_into(
    model: nn.Module, directory: str | Path, *, resident: str = "codes", decoded_bytes: int | None = None
) -> Attached:
    """Puts a compact directory on a model, without PEFT; the adapter is active until `remove`.

    The update is computed in float32 (float64 where stored so) and added to each layer's output. For inference: the numbers are
    not parameters of the model. For training, merging or several adapters use `bslora_convert.peft`.

    resident: what an adapter in codes is held as: `codes`, decoded when it is used, or `floats`. decoded_bytes: how much may be
    decoded at a time of all the adapters on this model; a GiB where nothing was said.

    :raises InputError: when the directory is damaged or the model is not the one that the adapter was made for.
    :raises RecipeError: for a wrong option.
    """
    check_choice("resident", resident, RESIDENT)
    if decoded_bytes is not None:
        decoded_of(model).limit = decoded_bytes
    if resident == "floats":
        adapter = load_compact(directory)
        return Attached(model, adapter.form, with_rows(adapter.carried, adapter.config, directory), directory)
    read = load_coded(directory)
    carried = with_rows(read.carried, read.config, directory)
    return Attached(model, read if isinstance(read, CodedAdapter) else read.form, carried, directory)


def decoded_of(model: nn.Module) -> Decoded:
    """What is decoded of the adapters in codes that were put on a model here."""
    return _decoded.setdefault(model, Decoded())


def _in_floats(form: BsloraForm, model: nn.Module, found: Mapping[str, Place]) -> Callable[[str], Parts]:
    """Every module's parts in float32 at least on the device of its layer, shared pairs once."""
    tensors, moved, layout = named_tensors(form), Moved(), Layout.of(form)

    def put(name: str) -> Parts:
        device = _device(model.get_submodule(found[name].layer))
        return parts_of(layout, name, lambda key: moved(tensors[key], device))

    return {name: put(name) for name in layout.modules}.__getitem__


def _device(layer: nn.Module) -> torch.device:
    return next(layer.parameters()).device


def _owner(name: str) -> str:
    """The module that a carried tensor belongs to."""
    return name.replace(".base_layer.", ".").rpartition(".")[0]


def _swap(model: nn.Module, path: str, name: str, tensor: Tensor | Rows, what: object) -> Callable[[], Any]:
    """A call that puts a whole weight of the adapter in the place of the model's and returns the call that puts it back."""
    leaf = name.rpartition(".")[2]
    try:
        owner = model.get_submodule(path)
        old = owner.get_parameter(leaf)
    except AttributeError:
        raise InputError(
            f"{what}: it carries {name}, which is no weight of the base model; load it with PEFT (bslora_convert.peft)"
        ) from None
    owners = [owner]
    if isinstance(tensor, Rows):
        if tensor.values.shape[1:] != old.shape[1:] or max(tensor.indices, default=0) >= len(old):
            raise InputError(f"{what}: trained rows of {name} don't fit the base model's {tuple(old.shape)}")
        whole = old.detach().clone()
        whole[list(tensor.indices)] = tensor.values.to(old.device, old.dtype)
        if is_input_embedding(model, owner):
            owners += [head for head in tied_heads(model).values() if head.get_parameter(leaf) is old]  # PEFT's rule
        tensor = whole
    if old.shape != tensor.shape:
        raise InputError(f"{what}: {name} is {tuple(tensor.shape)}, {tuple(old.shape)} in the base model")

    def exchange(mine: nn.Parameter, theirs: nn.Parameter) -> Callable[[], Any]:
        for one in owners:
            setattr(one, leaf, mine)
        return partial(exchange, theirs, mine)

    return partial(exchange, nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False), old)
