"""A base layer with compact adapters beside it.

Each adapter's local factors and its own kernels or gates are registered here. A shared pair is registered in the layer that owns
it and referred to by the others, so that it is in memory once, in a state dict once, and never another adapter's. An adapter that
is held as codes is registered whole in the first layer that it changes, and the others find it in what all layers share.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from bslora_convert.bslora.form import LEVELS
from bslora_convert.bslora.forward import add_head, add_lookup, add_update, dense
from bslora_convert.bslora.parts import Parts, laid_out
from bslora_convert.bslora.resident import Resident
from bslora_convert.bslora.transforms import TRANSFORMS, Transform
from bslora_convert.errors import RecipeError
from bslora_convert.layers.shapes import is_transposed
from bslora_convert.modules.factors import Factors, Shape, Use
from bslora_convert.peft.initial import Init
from bslora_convert.peft.table import AdapterTable, Owner

LOCAL = ("bslora_local_A", "bslora_local_B")
SHARED = tuple(
    f"bslora_{level}_{name}"
    for level in LEVELS
    for name in ("A", "B", *(f"own_{own}" for kind in TRANSFORMS.values() for own in cast(Any, kind).own_names))
)
HALF = (torch.float16, torch.bfloat16)
CODES = "bslora_codes"  # adapters that are held as codes, registered in a layer
BASE = "__base__"  # PEFT's name for a row of a mixed batch that takes no adapter


class BsloraLayer(nn.Module, BaseTunerLayer):
    """A linear layer, transformers' Conv1D or an embedding, quantised or not, and its compact adapters by name.

    One ParameterDict, by adapter, for each tensor of the format (`bslora_local_A`, `bslora_inter_own_B`, …), made when the first
    adapter needs it: a hundred adapters cost their numbers and little more.
    """

    other_param_names = ("shared", "scaling", "tied", "coded")
    is_expert = False

    def __init__(self, base_layer: nn.Module, name: str, table: AdapterTable) -> None:
        """base_layer: the layer that is adapted; it stays as it is. name: the model's for it. table: of the model's layers."""
        super().__init__()
        self.base_layer = base_layer
        self.name, self.table = name, table
        table.layers[name] = self
        self.adapter_layer_names: tuple[str, ...] = ()
        # adapter -> transform and, by level, where its pair is registered; a dict, so that only the owner registers a pair
        self.shared: dict[str, tuple[Transform | None, dict[str, Owner]]] = {}
        self.scaling: dict[str, float] = {}
        # adapter -> the embedding whose weight this layer shares, where it gets that one's update
        self.tied: dict[str, BsloraLayer] = {}
        self.is_embedding = isinstance(self.get_base_layer(), nn.Embedding)  # looks rows up
        self._disable_adapters = False
        self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
        self.merged_adapters: list[str] = []
        self.quantization_backend = resolve_quantization_backend(base_layer)

    def update_layer(
        self,
        adapter_name: str,
        transform: Transform | None,
        tensors: Mapping[str, Shape],
        owners: Mapping[str, Owner],
        train: str,
        inference_mode: bool,
        scaling: float = 1.0,
        init: Init | None = None,
    ) -> None:
        """Adds an adapter.

        tensors: shapes of what is registered here, by name (`local_A`, `intra_own_B`, the pairs that this layer owns).
        owners: by level, who registers the pair that it uses. train: the parts that get gradients.
        scaling: of every part. init: how the tensors are drawn; zeros where None.
        """
        trains = adapter_name in self.active_adapters and not inference_mode
        device, dtype = self.placed()
        for name, shape in tensors.items():  # nothing looks at other adapters: the thousandth is as quick as the first
            numbers = torch.zeros(shape, device=device, dtype=dtype)
            if init is not None:
                numbers.copy_(init.numbers(self.name, name, shape))
            self._held(name)[adapter_name] = nn.Parameter(numbers, requires_grad=trains)
        self.shared[adapter_name] = transform, dict(owners)
        self.scaling[adapter_name] = scaling
        empty = tuple(f"bslora_{name}" for name, shape in tensors.items() if 0 in shape)  # no gradient reaches them
        self.frozen_peft_weight_names[adapter_name] = {"all": empty, "local": (*SHARED, *empty), "shared": LOCAL}[train]
        self._freeze_non_trainable_peft_weights(adapter_name)

    def fill(self, adapter_name: str, tensors: Mapping[str, Tensor], autocast: bool) -> None:
        """Gives an adapter that was added its numbers, by name as in `update_layer`, frozen.

        autocast: whether they are in float32 where the base is in half precision.
        """
        device, dtype = self.placed()
        dtype = torch.float32 if dtype is None or (autocast and dtype in HALF) else dtype
        for name, tensor in tensors.items():
            numbers = laid_out(tensor.to(device, dtype, copy=True))
            self._held(name)[adapter_name] = nn.Parameter(numbers, requires_grad=False)

    def keep(self, adapter_name: str, resident: Resident) -> None:
        """Registers a whole adapter that is held as codes, for this layer and all others that it changes."""
        if CODES not in self._modules:
            self.register_module(CODES, nn.ModuleDict())
            self.adapter_layer_names = (*self.adapter_layer_names, CODES)
        cast(nn.ModuleDict, self._modules[CODES])[adapter_name] = resident
        self.table.adapters[adapter_name] = resident
        resident.to(*self.placed())

    @property
    def coded(self) -> dict[str, Resident]:
        """The model's adapters that are held as codes, by name."""
        return self.table.adapters

    def placed(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Where the base weight is and what the base layer computes in; None where that can't be told."""
        layer: Any = self.get_base_layer()
        device, dtype = self._get_base_layer_device_and_dtype(layer)  # type: ignore[no-untyped-call]
        return device, dtype if dtype is not None and dtype.is_floating_point else None

    def delete_adapter(self, adapter_name: str) -> None:
        """As PEFT's; what is decoded of one in codes goes too."""
        if adapter_name in self.coded:
            self.coded[adapter_name].leave()
        super().delete_adapter(adapter_name)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """As PEFT's.

        :raises RecipeError: when an adapter that is held as codes is to be trained.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        coded = [name for name in names if name in self.coded]
        if requires_grad and coded:
            raise RecipeError(
                f"adapter {coded[0]} is held as codes, which can't be trained: load it with is_trainable=True"
            )
        super().set_requires_grad(adapter_names, requires_grad)

    def tie(self, adapter_name: str, embedding: "BsloraLayer") -> None:
        """Adds an embedding's update for the layer that shares its weight; nothing is registered here."""
        self.tied[adapter_name] = embedding

    def holds(self, adapter_name: str) -> bool:
        """Whether an adapter changes this layer."""
        if adapter_name in self.shared or adapter_name in self.tied:
            return True
        resident = self.table.adapters.get(adapter_name)
        return resident is not None and resident.holds(self.name)

    def _held(self, name: str) -> nn.ParameterDict:
        """One tensor of the format by adapter."""
        attribute = f"bslora_{name}"
        if attribute not in self._modules:
            self.register_module(attribute, nn.ParameterDict())
            self.adapter_layer_names = (*self.adapter_layer_names, attribute)
        return cast(nn.ParameterDict, self._modules[attribute])

    def pair(self, level: str, adapter_name: str) -> Factors:
        """A pair of an adapter that is registered here, local or shared, with the adapter's scaling."""
        b, scaling = self._tensor(f"{level}_B", adapter_name), self.scaling[adapter_name]
        return Factors(b if scaling == 1 else b * scaling, self._tensor(f"{level}_A", adapter_name))

    def _tensor(self, name: str, adapter_name: str) -> Tensor:
        held = cast(nn.ParameterDict, self._modules[f"bslora_{name}"])
        return cast(
            Tensor, held._parameters[adapter_name]
        )  # a step of decoding asks ten times a layer; an index is slow

    def parts(self, adapter_name: str) -> Parts:
        """An adapter's local factors, its transform and its uses of shared pairs, as the forward pass takes them."""
        resident = self.table.adapters.get(adapter_name)
        if resident is not None:
            return resident.parts(self.name)
        local = self.pair("local", adapter_name)
        transform, owners = self.shared[adapter_name]
        uses: list[Use] = []
        for level, owner in owners.items():
            assert owner.layer is not None and transform is not None  # every owner is a module of the model
            pair = owner.layer.pair(level, adapter_name)
            if pair.a.device != local.a.device:  # a pair lives where its owner does
                pair = pair.to(device=local.a.device)
            own = {name: self._tensor(f"{level}_own_{name}", adapter_name) for name in transform.own_names}
            uses.append((pair, own))
        return local, transform, uses

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        """The base layer's output plus the active adapters' updates; adapter_names: one name a row of the batch."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._base(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch(x, adapter_names, *args, **kwargs)
        result = self._base(x, *args, **kwargs)
        if self.merged:
            return result
        for adapter_name in self.active_adapters:
            if self.holds(adapter_name):
                result = self._add(result, x, adapter_name)
        return result

    def _base(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return result

    def _add(self, result: Tensor, x: Tensor, adapter_name: str) -> Tensor:
        if adapter_name in self.tied:
            return add_head(result, x, *self.tied[adapter_name].parts(adapter_name))
        if self.is_embedding:
            scale = getattr(self.get_base_layer(), "embed_scale", None)  # Gemma scales what it looks up
            return add_lookup(result, x, *self.parts(adapter_name), scale=scale)
        return add_update(result, x, *self.parts(adapter_name))

    def _mixed_batch(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Each row of the batch through the adapter that it names."""
        if len(adapter_names) != len(x):
            raise ValueError(f"adapter_names has {len(adapter_names)} names for a batch of {len(x)} rows")
        if self.merged:
            raise ValueError("Rows of a batch can't name their adapters while adapters are merged; unmerge first")
        result = self._base(x, *args, **kwargs)
        for adapter_name in dict.fromkeys(adapter_names):
            if adapter_name == BASE or not self.holds(adapter_name):
                continue
            rows = [row for row, name in enumerate(adapter_names) if name == adapter_name]
            result = result.index_copy(
                0, torch.tensor(rows, device=result.device), self._add(result[rows], x[rows], adapter_name)
            )
        return result

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """An adapter's whole update in the layout of the base weight: (out, in), transposed for Conv1D and embeddings."""
        if adapter_name in self.tied:
            return self.tied[adapter_name].get_delta_weight(adapter_name)
        delta = dense(*self.parts(adapter_name))
        return delta.T if is_transposed(self.get_base_layer()) else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds the active (or named) adapters to the base weight; safe_merge: only if the result is finite."""
        adapter_names = check_adapters_to_merge(self, adapter_names)
        for adapter_name in adapter_names:
            if self.holds(adapter_name) and not self._gets_it_by_itself(adapter_name):
                weight = self._changed(adapter_name, 1)
                if safe_merge and not torch.isfinite(weight).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken"
                    )
                self.set_base_weight(weight)
            if self.holds(adapter_name):
                self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Takes merged adapters out of the base weight again, exact up to rounding."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            if not self._gets_it_by_itself(adapter_name):
                self.set_base_weight(self._changed(adapter_name, -1))

    def _gets_it_by_itself(self, adapter_name: str) -> bool:
        """Whether merging into the embedding changes this layer's weight too, as it is the same parameter."""
        tied = self.tied.get(adapter_name)
        return tied is not None and self.get_base_layer().weight is tied.get_base_layer().weight

    def _changed(self, adapter_name: str, sign: int) -> Tensor:
        if self.quantization_backend is not None and not self.quantization_backend.supports_merge:
            raise ValueError(
                f"A base layer quantised by {self.quantization_backend.backend_name} can't be merged into; load the base "
                "in a float type"
            )
        weight = self.get_base_weight()
        delta = self.get_delta_weight(adapter_name)
        changed: Tensor = (weight.to(delta.dtype) + sign * delta).to(weight.dtype)
        return changed

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` works through `get_delta_weight`; `bslora-convert expand` is exact and needs no model."""
        return True

    def __repr__(self) -> str:
        return "bslora." + super().__repr__()
