"""A form on a model through forward hooks: no PEFT, nothing replaced, and taken off again without a trace."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from bslora_convert.base import check_fits
from bslora_convert.bslora.factors import Factors
from bslora_convert.bslora.form import BsloraForm
from bslora_convert.bslora.forward import add_lookup, add_update
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.storage import load_compact
from bslora_convert.errors import InputError


class Attached:
    """An adapter on a model. `enabled` switches it; `remove` takes it off; as a context it is on only inside."""

    def __init__(
        self, model: nn.Module, form: BsloraForm, carried: Mapping[str, Tensor], what: object, enabled: bool = True
    ) -> None:
        """Hooks a form's modules and holds the tensors that replace the model's own.

        :raises InputError: when the model is not the one that the adapter was made for.
        """
        check_fits(Layout.of(form).modules, model, what)
        self.carried = carried
        self._swaps = [_swap(model, name, tensor, what) for name, tensor in carried.items()]
        self._enabled = False
        moved = _Moved()
        self._handles = [
            model.get_submodule(name).register_forward_hook(self._hook(form, name, model.get_submodule(name), moved))
            for name in form.modules
        ]
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

    def __enter__(self) -> "Attached":
        self.enabled = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.enabled = False

    def _hook(self, form: BsloraForm, name: str, layer: nn.Module, moved: "_Moved") -> Callable[..., Any]:
        module = form.modules[name]
        weight = next(layer.parameters())
        to = partial(moved, device=weight.device)
        local = to(module.local)
        uses = [
            (to(form.pair(level, path.group)), {key: moved.tensor(t, weight.device) for key, t in path.own.items()})
            for level, path in module.paths.items()
        ]
        add = add_lookup if module.kind == "embedding" else add_update

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return add(output, inputs[0], local, form.transform, uses) if self._enabled else output

        return hook


def load_into(model: nn.Module, directory: str | Path) -> Attached:
    """Puts a compact directory on a model, without PEFT; the adapter is active until `remove`.

    The update is computed in float32 (float64 where stored so) and added to each layer's output. For inference: the numbers are
    not parameters of the model. For training, merging or several adapters use `bslora_convert.peft`.

    :raises InputError: when the directory is damaged or the model is not the one that the adapter was made for.
    """
    adapter = load_compact(directory)
    return Attached(model, adapter.form, adapter.carried, directory)


class _Moved:
    """Each tensor on a device in float32 at least, shared ones once."""

    def __init__(self) -> None:
        self._seen: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, factors: Factors, device: torch.device) -> Factors:
        return Factors(self.tensor(factors.b, device), self.tensor(factors.a, device))

    def tensor(self, tensor: Tensor, device: torch.device) -> Tensor:
        """The tensor as the forward pass takes it."""
        key = (id(tensor), device)
        if key not in self._seen:
            self._seen[key] = tensor.to(device, torch.promote_types(tensor.dtype, torch.float32))
        return self._seen[key]


def _swap(model: nn.Module, name: str, tensor: Tensor, what: object) -> Callable[[], Any]:
    """A call that puts a whole weight of the adapter in the place of the model's and returns the call that puts it back."""
    path, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
    try:
        owner = model.get_submodule(path)
        old = owner.get_parameter(leaf)
    except AttributeError:
        raise InputError(
            f"{what}: it carries {name}, which is no weight of the base model; load it with PEFT (bslora_convert.peft)"
        ) from None
    if old.shape != tensor.shape:
        raise InputError(f"{what}: {name} is {tuple(tensor.shape)}, {tuple(old.shape)} in the base model")

    def exchange(mine: nn.Parameter, theirs: nn.Parameter) -> Callable[[], Any]:
        setattr(owner, leaf, mine)
        return partial(exchange, theirs, mine)

    return partial(exchange, nn.Parameter(tensor.to(old.device, old.dtype), requires_grad=False), old)
