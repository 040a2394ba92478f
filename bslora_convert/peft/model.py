"""The tuner: puts compact adapters on a model's layers and keeps them apart."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules
from torch import Tensor, nn

from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.resident import Resident
from bslora_convert.bslora.storage import CONFIG_NAME, PEFT_TYPE, PREFIX, WEIGHTS_NAME
from bslora_convert.errors import Refused
from bslora_convert.layers.names import Place, is_input_embedding, tied_heads
from bslora_convert.layers.shapes import check_fits
from bslora_convert.peft.config import scaled, split
from bslora_convert.peft.experts import BsloraExperts
from bslora_convert.peft.layer import BASE, HALF, BsloraLayer
from bslora_convert.peft.table import AdapterTable, Owner


class BsloraModel(BaseTuner):
    """Compact adapters of one base model."""

    prefix = f"{PEFT_TYPE.lower()}_"
    tuner_layer_cls = BsloraLayer
    target_module_mapping = {}  # noqa: RUF012  an adapter always says what it targets

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Checks that the adapter was made for this model and starts a new set of owners.

        :raises InputError: naming a module that is missing or has another shape.
        """
        self._table = table_of(model) or AdapterTable()
        found = self._places(peft_config, model)
        if peft_config.decoded_bytes is not None:
            self._table.decoded.limit = peft_config.decoded_bytes
        peft_config.rename({name: place.name for name, place in found.items()})
        self._layout: Layout = peft_config.layout()
        self._owners: dict[tuple[str, str], Owner] = {}
        self._experts: dict[str, list[Place]] = {}
        for place in found.values():
            if place.slice is not None:
                self._experts.setdefault(place.layer, []).append(place)
        peft_config.layers = frozenset(place.layer for place in found.values())
        tied = [name for name, entry in self._layout.modules.items() if entry.kind == "tied_embedding"]
        if any(is_input_embedding(model, model.get_submodule(name)) for name in tied):
            heads = [name for name in tied_heads(model) if name not in self._layout.modules]
            peft_config.target_modules_to_tie = heads

    def _places(self, peft_config: Any, model: nn.Module) -> dict[str, Place]:
        modules = peft_config.stored.modules
        asked = tuple((name, entry.shape) for name, entry in modules.items())
        if asked not in self._table.places:
            what = peft_config.base_model_name_or_path or CONFIG_NAME
            self._table.places[asked] = check_fits(modules, model, what)
        return self._table.places[asked]

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
            holder = target if isinstance(target, BsloraExperts) else BsloraExperts(target, self._table)
            for place in self._experts[current_key]:
                self._put(peft_config, adapter_name, holder.layer(place), place.name)
            self._replaced(adapter_name, target_name, parent, target, holder)
            return
        layer = target if isinstance(target, BsloraLayer) else BsloraLayer(target, current_key, self._table)
        if current_key in self._layout.modules:
            self._put(peft_config, adapter_name, layer, current_key)
        else:
            embedding: Any = self.model.get_input_embeddings()
            layer.tie(adapter_name, embedding)
        self._replaced(adapter_name, target_name, parent, target, layer)

    def _put(self, peft_config: Any, adapter_name: str, layer: BsloraLayer, current_key: str) -> None:
        if peft_config.stays_coded:
            if adapter_name not in self._table.adapters:
                layer.keep(adapter_name, self._resident(peft_config))
            return
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
            peft_config.scaling,
            peft_config.init,
        )

    def _resident(self, peft_config: Any) -> Resident:
        """An adapter to be held as codes; `_remap_adapter_state_dict_for_load` brings them."""
        stored, named = peft_config.stored, peft_config.layout()
        names = None if stored is named else dict(zip(named.modules, stored.modules, strict=True))
        return Resident(stored, peft_config.stored_dtype, self._table.decoded, self._table.device_of, names)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """As PEFT's; what is in codes is decoded to float32 where floats are cast to it, and now where it is active."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        resident = self._table.adapters.get(adapter_name)
        if resident is None:
            return
        if autocast_adapter_dtype and resident.like.dtype in HALF:
            resident.float()
        self._make_ready()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """As PEFT's; what is in codes and now active is decoded, as far as there is room."""
        super().set_adapter(adapter_name, inference_mode)
        self._make_ready()

    def _make_ready(self) -> None:
        for name in self.active_adapters:
            if (resident := self._table.adapters.get(name)) is not None and resident.is_filled:
                resident.ready()

    def put(self, adapter_name: str, peft_config: Any, tensors: Mapping[str, Tensor], autocast: bool) -> None:
        """Adds an adapter with its numbers, frozen and not active, at a cost that does not depend on how many there are.

        tensors: of its file, all of them the form's. autocast: as PEFT's `autocast_adapter_dtype`.

        :raises InputError: when it does not fit the model or is damaged; the model is then as it was.
        """
        self._prepare_model(peft_config, self.model)
        self.peft_config[adapter_name] = peft_config
        try:
            layers = dict.fromkeys(place.layer for place in self._places(peft_config, self.model).values())
            for key in (*layers, *peft_config.target_modules_to_tie):
                known = key in self._table.layers
                if known and key in layers and adapter_name in self._table.adapters:
                    continue  # an adapter in codes is registered once
                parent, target, target_name = _get_submodules(self.model, key)
                self._create_and_replace(peft_config, adapter_name, target, target_name, parent, key)
                if not known:
                    parent.get_submodule(target_name).apply(self._as_the_others)
            self._fill(adapter_name, peft_config, tensors, autocast)
        except BaseException:
            self.delete_adapter(adapter_name)
            raise

    def _as_the_others(self, module: nn.Module) -> None:
        """What a layer that is wrapped late is told."""
        if isinstance(module, BsloraLayer):
            module.set_adapter(self.active_adapters, inference_mode=True)

    def _fill(self, adapter_name: str, peft_config: Any, tensors: Mapping[str, Tensor], autocast: bool) -> None:
        resident = self._table.adapters.get(adapter_name)
        if resident is not None:
            resident.fill(split(tensors)[0], WEIGHTS_NAME)
            if autocast and resident.like.dtype in HALF:
                resident.float()
            return
        whole = peft_config.put_together(tensors)
        for name in self._layout.modules:
            layer = self._table.layers[name]
            held = {key: whole[f"{PREFIX}{name}.bslora_{key}"] for key in self._layout.held_by(name)}
            layer.fill(adapter_name, held, autocast)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """As LoRA's, which hands no weight from layer to layer, but looks for one that stacked experts do not have."""
        if isinstance(new_module, BsloraExperts) or isinstance(child, BsloraExperts):
            setattr(parent, child_name, new_module)
        else:
            LoraModel._replace_module(self, parent, child_name, new_module, child)  # type: ignore[arg-type]

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()  # type: ignore[no-untyped-call]
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("what GPTQ quantised can't be merged into")

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        """:raises Refused: always: the sum of two forms is no such form."""
        raise Refused(
            "a weighted sum of compact adapters is not formed here: `bslora-convert expand` each, and add them in PEFT as LoRAs"
        )

    def subtract_mutated_init(self, *_: Any, **__: Any) -> None:
        """:raises Refused: always: compact adapters never change the base."""
        raise Refused("compact adapters never change the base, so nothing is to be subtracted")

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
        """What `save_pretrained` writes: codes as they came, floats in the dtype of storage wherever that loses nothing."""
        table = table_of(model)
        if table is not None and adapter_name in table.adapters:
            prefix = PREFIX if isinstance(model, PeftModel) else ""
            return {prefix + name: tensor for name, tensor in table.adapters[adapter_name].codes.items()}
        held = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        tensors = scaled(held, config.scaling)
        stored = getattr(torch, config.dtype)
        cast = {key: tensor.to(stored) for key, tensor in tensors.items()}
        exact = all(torch.equal(cast[key].to(tensor.dtype), tensor) for key, tensor in tensors.items())
        return cast if exact else tensors

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What `from_pretrained` puts on the model: codes, as they are or decoded."""
        table = table_of(model)
        resident = table.adapters.get(adapter_name) if table is not None else None
        if resident is None:
            tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
                model, config, adapter_name, config.put_together(state_dict)
            )
            return tensors
        codes, rest = split(state_dict)
        resident.fill(codes, WEIGHTS_NAME)
        place = next(name for name, module in model.named_modules() if module is resident)
        return rest | {f"{place}.{name}": tensor for name, tensor in resident.state_dict().items()}

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


def table_of(model: nn.Module) -> AdapterTable | None:
    """What a model's layers share; None where it has none yet."""
    return next((module.table for module in model.modules() if isinstance(module, BsloraLayer)), None)
