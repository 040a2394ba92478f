"""Adapters made on the fly: planted forms, LoRA directories, modules with chosen spectra."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bslora_convert.bslora.form import BsloraForm, Module
from bslora_convert.bslora.form import Path as SharedPath
from bslora_convert.bslora.transforms import Gate, Kronecker, Slice
from bslora_convert.initialisation import kept
from bslora_convert.initialisation.initial import _drawn
from bslora_convert.modules.factors import Factors, Shape

# A decoder layer with grouped-query attention: seven kinds of modules, four shapes.
KINDS: dict[str, Shape] = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (32, 64),
    "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (128, 64),
    "mlp.up_proj": (128, 64),
    "mlp.down_proj": (64, 128),
}


@dataclass(frozen=True)
class Product:
    """A delta for the fit, held as it is."""

    held: Factors

    @property
    def shape(self) -> Shape:
        return self.held.shape

    @property
    def rank(self) -> int:
        return self.held.rank

    @property
    def stored(self) -> Factors:
        return self.held

    @property
    def scaling(self) -> float:
        return 1.0

    def factors(self) -> Factors:
        return self.held


def deltas_of(form: BsloraForm) -> dict[str, Product]:
    """A form's modules as the products that a LoRA would hold."""
    return {name: Product(form.delta(name)) for name in form.modules}


def plant(
    transform: Kronecker | Slice | Gate,
    ranks: tuple[int, int, int] = (2, 4, 8),
    layers: int = 4,
    seed: int = 0,
    kinds: Mapping[str, Shape] = KINDS,
    kernel_ranks: tuple[int, int] = (1, 1),
    dtype: torch.dtype = torch.float32,
) -> BsloraForm:
    """A random form of these ranks: (local, intra, inter) of the shared pairs, kernels of `kernel_ranks` (intra, inter)."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    rows, columns = transform.pair_sizes

    def pair(rank: int) -> Factors:
        return Factors(random(rows, rank), random(rank, columns))

    local, intra, inter = ranks
    shared: dict[str, dict[str, Factors]] = {}
    if intra:
        shared["intra"] = {f"model.layers.{layer}": pair(intra) for layer in range(layers)}
    if inter:
        shared["inter"] = {"all": pair(inter)}
    modules = {}
    for layer in range(layers):
        for kind, (out, width) in kinds.items():
            paths = {}
            for level, kernel_rank in zip(("intra", "inter"), kernel_ranks, strict=True):
                if level in shared:
                    group = f"model.layers.{layer}" if level == "intra" else "all"
                    shapes = transform.own_shapes((out, width), kernel_rank)
                    paths[level] = SharedPath(group, {name: random(*shape) for name, shape in shapes.items()})
            factors = Factors(random(out, local), random(local, width))
            modules[f"model.layers.{layer}.{kind}"] = Module((out, width), factors, paths)
    return BsloraForm(transform, modules, shared)


def random_products(
    layers: int = 2, rank: int = 8, seed: int = 0, decay: float = 0.8, kinds: Mapping[str, Shape] = KINDS
) -> dict[str, Product]:
    """Independent random deltas whose singular values fall off as trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    scale = decay ** torch.arange(rank)
    return {
        f"model.layers.{layer}.{kind}": Product(
            Factors(
                torch.randn(out, rank, generator=generator) * scale,
                torch.randn(rank, width, generator=generator),
            )
        )
        for layer in range(layers)
        for kind, (out, width) in kinds.items()
    }


def write_lora(
    directory: Path,
    products: Mapping[str, Product | Factors],
    *,
    alpha: float | None = None,
    dtype: torch.dtype = torch.float32,
    extra: Mapping[str, Tensor] | None = None,
    **config: Any,
) -> Path:
    """A PEFT LoRA directory with these factors; `alpha` defaults to the rank, so that the scaling is one."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = dict(extra or {})
    rank = 1
    for name, product in products.items():
        factors = product.held if isinstance(product, Product) else product
        rank = factors.rank
        tensors[f"base_model.model.{name}.lora_A.weight"] = factors.a.to(dtype).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = factors.b.to(dtype).contiguous()
    fields = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in products}),
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "a-base-model",
        **config,
    }
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def drawn_lora(
    source: Path, place: Path, seed: int = 42, offset: int = 0, changed: float = 0.2, trained: int = 1
) -> Path:
    """A copy of a LoRA directory whose A's are drawn as PEFT draws them, then changed by normal noise of this relative size.

    trained: the seed of the noise: siblings have one seed and another noise.
    """
    place.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name != "adapter_model.safetensors":
            (place / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "adapter_model.safetensors")
    torch.manual_seed(seed)
    torch.empty(offset).uniform_()
    noise = torch.Generator().manual_seed(trained)
    for key in sorted(key for key in tensors if key.endswith("lora_A.weight")):
        a, b = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        torch.empty(a.numel() + b.numel()).uniform_()
        fresh = torch.nn.init.kaiming_uniform_(torch.empty(a.shape), a=5**0.5)
        fresh += changed * fresh.square().mean().sqrt() * torch.randn(fresh.shape, generator=noise)
        tensors[key] = fresh.to(a.dtype)
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    return place


UNKNOWN = 618_033_988  # a seed that no search tries


def siblings(place: Path, source: Path, count: int) -> Path:
    """Adapters t0, t1, … of one pipeline whose seed nobody knows: a source's A's drawn anew, alike, and trained each its way."""
    for number in range(count):
        drawn_lora(source, place / f"t{number}", UNKNOWN, trained=number)
    return place


def forget_draws() -> None:
    """Lets go of all draws, as another process would have none."""
    kept._kept.clear()
    _drawn.cache_clear()
