"""Converts existing LoRA adapters into BSLoRA form, and says exactly what was kept.

    from bslora_convert import Recipe, compress, expand, inspect, load_compact, load_into, load_lora, load_many
    from bslora_convert import save_compact, verify

Names are loaded when first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bslora_convert.version import __version__

if TYPE_CHECKING:
    from bslora_convert.behaviour.attach import load_into
    from bslora_convert.bslora.storage import load_compact, save_compact
    from bslora_convert.lora import load_lora
    from bslora_convert.peft.many import load_many
    from bslora_convert.recipe.recipe import Recipe
    from bslora_convert.recipe.training import Training
    from bslora_convert.verbs.analyze import analyze
    from bslora_convert.verbs.batch import batch
    from bslora_convert.verbs.compare import compare
    from bslora_convert.verbs.compress import compress
    from bslora_convert.verbs.expand import expand
    from bslora_convert.verbs.expand_library import expand_library
    from bslora_convert.verbs.finetune import finetune
    from bslora_convert.verbs.inspect import inspect
    from bslora_convert.verbs.inspect_library import inspect_library
    from bslora_convert.verbs.push import push
    from bslora_convert.verbs.verify import verify
    from bslora_convert.verbs.verify_library import verify_library

_HOMES = {
    "Recipe": "bslora_convert.recipe.recipe",
    "analyze": "bslora_convert.verbs.analyze",
    "batch": "bslora_convert.verbs.batch",
    "compare": "bslora_convert.verbs.compare",
    "compress": "bslora_convert.verbs.compress",
    "Training": "bslora_convert.recipe.training",
    "expand": "bslora_convert.verbs.expand",
    "expand_library": "bslora_convert.verbs.expand_library",
    "finetune": "bslora_convert.verbs.finetune",
    "inspect": "bslora_convert.verbs.inspect",
    "inspect_library": "bslora_convert.verbs.inspect_library",
    "load_compact": "bslora_convert.bslora.storage",
    "load_into": "bslora_convert.behaviour.attach",
    "load_lora": "bslora_convert.lora",
    "load_many": "bslora_convert.peft.many",
    "push": "bslora_convert.verbs.push",
    "save_compact": "bslora_convert.bslora.storage",
    "verify": "bslora_convert.verbs.verify",
    "verify_library": "bslora_convert.verbs.verify_library",
}

__all__ = [
    "Recipe",
    "Training",
    "__version__",
    "analyze",
    "batch",
    "compare",
    "compress",
    "expand",
    "expand_library",
    "finetune",
    "inspect",
    "inspect_library",
    "load_compact",
    "load_into",
    "load_lora",
    "load_many",
    "push",
    "save_compact",
    "verify",
    "verify_library",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
