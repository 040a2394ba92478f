"""The BSLoRA form: a local part per module, a part shared within its layer, a part shared across all layers.

    ΔW_m = B_m A_m  +  T_m(B A of m's layer)  +  T_m(B A of all layers)
           local       intra                     inter                      T: slice, gate or Kronecker

All scaling is folded into the factors. A shared pair is held once, in `shared[level][group]`; a module names the
group it uses and holds what is its own of that path (kernels, gates).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bslora_convert.bslora.transforms import Transform
from bslora_convert.modules.factors import Factors, Shape, add

LEVELS = ("intra", "inter")
PARTS = ("local", *LEVELS)
KINDS = ("linear", "embedding", "tied_embedding")  # tied: the head that shares its weight gets the update as well


@dataclass(frozen=True, slots=True)
class Path:
    """A module's use of a shared pair: the group that owns the pair and the module's own tensors."""

    group: str
    own: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Module:
    """One adapted module: shape (out, in), local factors, and a path for each level it shares on."""

    shape: Shape
    local: Factors
    paths: Mapping[str, Path] = field(default_factory=dict)
    kind: str = "linear"


@dataclass(frozen=True, slots=True)
class BsloraForm:
    """A whole adapter in BSLoRA form; `transform` is None where nothing is shared."""

    transform: Transform | None
    modules: Mapping[str, Module]
    shared: Mapping[str, Mapping[str, Factors]] = field(default_factory=dict)

    def pair(self, level: str, group: str) -> Factors:
        """The shared pair of a group."""
        return self.shared[level][group]

    def part(self, name: str, part: str) -> Factors | None:
        """One part of a module's delta as factors of the module's shape, None where the module has no such part.

        Computed in float32 at least, whatever the storage dtype.
        """
        module = self.modules[name]
        dtype = torch.promote_types(module.local.b.dtype, torch.float32)
        if part == "local":
            return module.local.to(dtype)
        path = module.paths.get(part)
        if path is None or self.transform is None:
            return None
        own = {key: tensor.to(dtype) for key, tensor in path.own.items()}
        return self.transform.factors(self.pair(part, path.group).to(dtype), own, module.shape)

    def parts(self, name: str) -> dict[str, Factors]:
        """All parts of a module's delta, by name of the part."""
        return {part: factors for part in PARTS if (factors := self.part(name, part)) is not None}

    def delta(self, name: str) -> Factors:
        """The module's whole ΔW as factors, ranks adding up: (out, R), (R, in), float32 at least."""
        return add(*self.parts(name).values())

    def expanded_rank(self, name: str) -> int:
        """Rank of the plain LoRA that equals this module, known without an SVD."""
        module = self.modules[name]
        rank = module.local.rank
        for level, path in module.paths.items():
            assert self.transform is not None  # a path exists only beside a transform
            rank += self.transform.path_rank(self.pair(level, path.group).rank, path.own)
        return rank

    def parts_parameters(self) -> dict[str, int]:
        """Stored numbers of each part; a shared factor counts once, kernels and gates with their level."""
        counts = {"local": sum(m.local.parameters for m in self.modules.values())}
        for level in LEVELS:
            counts[level] = sum(pair.parameters for pair in self.shared.get(level, {}).values()) + sum(
                tensor.numel()
                for module in self.modules.values()
                if level in module.paths
                for tensor in module.paths[level].own.values()
            )
        return counts

    @property
    def transform_name(self) -> str:
        """`none` without shared parts."""
        return self.transform.name if self.transform else "none"

    @property
    def parameters(self) -> int:
        """Stored numbers in all."""
        return sum(self.parts_parameters().values())

    def shared_rank(self, level: str) -> int:
        """Largest rank of the shared pairs of a level, 0 where there is none."""
        return max((pair.rank for pair in self.shared.get(level, {}).values()), default=0)

    def tensors(self) -> Iterator[Tensor]:
        """Every stored tensor, once."""
        for module in self.modules.values():
            yield from (module.local.b, module.local.a)
            for path in module.paths.values():
                yield from path.own.values()
        for groups in self.shared.values():
            for pair in groups.values():
                yield from (pair.b, pair.a)

    def to(self, dtype: torch.dtype) -> "BsloraForm":
        """The form with every tensor in another dtype."""

        def cast(module: Module) -> Module:
            paths = {
                level: Path(path.group, {name: tensor.to(dtype) for name, tensor in path.own.items()})
                for level, path in module.paths.items()
            }
            return replace(module, local=module.local.to(dtype), paths=paths)

        return replace(
            self,
            modules={name: cast(module) for name, module in self.modules.items()},
            shared={
                level: {group: pair.to(dtype) for group, pair in groups.items()}
                for level, groups in self.shared.items()
            },
        )
