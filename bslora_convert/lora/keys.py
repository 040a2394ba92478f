"""Keys of a weight file -> names of modules: what PEFT, compilers and trainers' wrappers put into them is taken off."""

import re
from collections.abc import Iterable

PREFIX = "base_model.model."
FACTOR = re.compile(r"^(?P<module>.+)\.lora_(?P<side>[AB])(\.(?P<adapter>[^.]+))?\.weight$")
EMBEDDING_FACTOR = re.compile(r"^(?P<module>.+)\.lora_embedding_(?P<side>[AB])(\.(?P<adapter>[^.]+))?$")

# Modules that wrap another one under a name of their own, anywhere: torch.compile, activation checkpointing, FSDP, Lightning.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_forward_module)\.")
PARALLEL = (
    "module."  # DataParallel, DDP and DeepSpeed wrap the whole model; in the middle of a name it may be a real one
)


def canonical(key: str) -> str:
    """A key without PEFT's prefix, however often it was wrapped, and without what wrappers add."""
    key = WRAPPERS.sub("", key)
    while key.startswith(PREFIX):
        key = key.removeprefix(PREFIX)
    return key


def names_of(keys: Iterable[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Each key's name, and the wrappers that were taken off.

    A leading `module.` is a wrapper's where every key of the file has it, before PEFT's prefix or after it.
    """
    keys = list(keys)
    found = {match[1]: None for key in keys for match in WRAPPERS.finditer(key)}
    names = {key: canonical(key) for key in keys}
    while names and all(name.startswith(PARALLEL) for name in names.values()):
        found[PARALLEL.rstrip(".")] = None
        names = {key: canonical(name.removeprefix(PARALLEL)) for key, name in names.items()}
    return names, tuple(found)
