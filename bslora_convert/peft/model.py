"""The tuner: puts compact adapters on a model's layers and keeps them apart."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraModel
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.storage import CONFIG_NAME, PEFT_TYPE
from bslora_convert.layers.names import Place, is_input_embedding, tied_heads
from bslora_convert.layers.shapes import check_fits
from bslora_convert.peft.experts import BsloraExperts
from bslora_convert.peft.layer import BASE, BsloraLayer, Owner


class BsloraModel(BaseTuner):
    """Compact adapters of one base model."""

    prefix = f"{PEFT_TYPE.lower()}_"
    tuner_layer_cls = BsloraLayer
    target_module_mapping = {}  # noqa: RUF012  an adapter always says what it targets

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Checks that the adapter was made for this model and starts a new set of owners.

        :raises InputError: naming a module that is missing or has another shape.
        """
        modules = peft_config.layout().modules
        found = check_fits(modules, model, peft_config.base_model_name_or_path or CONFIG_NAME)
        peft_config.rename({name: place.name for name, place in found.items()})
        self._layout: Layout = peft_config.layout()
        self._owners: dict[tuple[str, str], Owner] = {}
        self._experts: dict[str, list[Place]] = {}
        for place in found.values():
            if place.slice is not None:
                self._experts.setdefault(place.layer, []).append(place)
        peft_config.layers = frozenset(place.layer for place in found.values())
        tied = [name for name, entry in self._layout.modules.items() if entry.kind == "tied_embedding"]
        heads = [name for name in tied_heads(model) if name not in self._layout.modules]
        if heads and any(is_input_embedding(model, model.get_submodule(name)) for name in tied):
            peft_config.target_modules_to_tie = heads

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> Any:
        if key in peft_config.layers:
            return True
        excluded = peft_config.exclude_modules and check_target_module_exists(peft_config, key)
        return excluded if isinstance(excluded, _ExcludedModule) else False

    def _add_targets_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        """Nothing: an adapter's own layout says which embedding is tied."""

    def _add_modules_to_save_to_tie(self, peft_config: Any, tied_weight_keys: list[str]) -> None:
        LoraModel._add_modules_to_save_to_tie(self, peft_config, tied_weight_keys)  # type: ignore[arg-type]

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Puts one module's part of an adapter on its layer, which is wrapped the first time."""
        if current_key in self._experts:
            holder = target if isinstance(target, BsloraExperts) else BsloraExperts(target)
            for place in self._experts[current_key]:
                self._put(peft_config, adapter_name, holder.layer(place), place.name)
            self._replaced(adapter_name, target_name, parent, target, holder)
            return
        layer = target if isinstance(target, BsloraLayer) else BsloraLayer(target)
        if current_key in self._layout.modules:
            self._put(peft_config, adapter_name, layer, current_key)
        else:
            embedding: Any = self.model.get_input_embeddings()
            layer.tie(adapter_name, embedding, peft_config.inference_mode)
        self._replaced(adapter_name, target_name, parent, target, layer)

    def _put(self, peft_config: Any, adapter_name: str, layer: BsloraLayer, current_key: str) -> None:
        owners = {}
        for level, group in self._layout.modules[current_key].groups.items():
            owners[level] = self._owners.setdefault((level, group), Owner())
            if self._layout.owners[level, group] == current_key:
                owners[level].layer = layer
        layer.update_layer(
            adapter_name,
            self._layout.transform,
            self._layout.held_by(current_key),
            owners,
            peft_config.train,
            peft_config.inference_mode,
        )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As PEFT's, which looks for a weight that a layer of stacked experts does not have."""
        if isinstance(new_module, BsloraExperts) or isinstance(child, BsloraExperts):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _replaced(
        self, adapter_name: str, target_name: str, parent: nn.Module, target: nn.Module, layer: nn.Module
    ) -> None:
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        """What `save_pretrained` writes: in the dtype that the adapter is stored in wherever that loses nothing."""
        tensors: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        stored = getattr(torch, config.dtype)
        cast = {key: tensor.to(stored) for key, tensor in tensors.items()}
        exact = all(torch.equal(cast[key].to(tensor.dtype), tensor) for key, tensor in tensors.items())
        return cast if exact else tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What `from_pretrained` puts on the model: codes are decoded, cores in a library's bases become local parts."""
        tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, config.put_together(state_dict)
        )
        return tensors

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Hands `adapter_names=[…]`, a name a row, to every layer of the batch."""
        names: Sequence[str] | None = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("adapter_names is for inference; call model.eval() first")
        if any(isinstance(module, BsloraExperts) for module in self.modules()):
            raise ValueError("adapter_names can't be given on a model whose experts are stacked and adapted")
        unknown = sorted(set(names) - set(self.peft_config) - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or 1
        repeated = [name for name in names for _ in range(beams)]
        layers = [m for m in self.modules() if isinstance(m, (BsloraLayer, AuxiliaryTrainingWrapper))]
        handles = [
            layer.register_forward_pre_hook(partial(_name_rows, adapter_names=repeated), with_kwargs=True)
            for layer in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _name_rows(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}
