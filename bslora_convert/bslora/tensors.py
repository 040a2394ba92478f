"""A form as tensors by their keys, without PEFT's prefix, and back."""

from collections.abc import Mapping

from torch import Tensor

from bslora_convert.bslora.form import BsloraForm, Module, Path
from bslora_convert.bslora.layout import Layout
from bslora_convert.modules.factors import Factors


def named_tensors(form: BsloraForm) -> dict[str, Tensor]:
    """Every tensor of a form by its key, without PEFT's prefix."""
    tensors: dict[str, Tensor] = {}
    for name, module in form.modules.items():
        tensors |= _pair(f"{name}.bslora_local", module.local)
        for level, path in module.paths.items():
            tensors |= {f"{name}.bslora_{level}_own_{own}": tensor for own, tensor in path.own.items()}
    for (level, group), owner in Layout.of(form).owners.items():
        tensors |= _pair(f"{owner}.bslora_{level}", form.pair(level, group))
    return tensors


def assemble(layout: Layout, tensors: Mapping[str, Tensor]) -> BsloraForm:
    """The form of a layout with these tensors, by key without PEFT's prefix."""

    def pair(prefix: str) -> Factors:
        return Factors(tensors[f"{prefix}_B"], tensors[f"{prefix}_A"])

    def path(name: str, level: str, group: str) -> Path:
        assert layout.transform is not None  # a group exists only beside a transform
        return Path(group, {key: tensors[f"{name}.bslora_{level}_own_{key}"] for key in layout.transform.own_names})

    shared: dict[str, dict[str, Factors]] = {}
    for (level, group), owner in layout.owners.items():
        shared.setdefault(level, {})[group] = pair(f"{owner}.bslora_{level}")
    modules = {
        name: Module(
            entry.shape,
            pair(f"{name}.bslora_local"),
            {level: path(name, level, group) for level, group in entry.groups.items()},
            entry.kind,
        )
        for name, entry in layout.modules.items()
    }
    return BsloraForm(layout.transform, modules, shared)


def _pair(prefix: str, factors: Factors) -> dict[str, Tensor]:
    return {f"{prefix}_A": factors.a, f"{prefix}_B": factors.b}
