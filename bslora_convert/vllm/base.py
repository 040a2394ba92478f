r"""Whether an adapter is for the base model that is served, by name and by shape: vLLM checks neither.

A name is the served one's, or an alias's, if both end alike: `org/My_Model`, `/models/my-model` and `D:\x\My-Model` do. Shapes
are those of the headers of the base's safetensors files; where there are none, names alone decide.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from bslora_convert.bslora.layout import Entry
from bslora_convert.errors import BsloraConvertError, Refused
from bslora_convert.files.tensorfile import FLOATS, read_headers
from bslora_convert.lora.experts import EXPERT
from bslora_convert.lora.names import split
from bslora_convert.modules.factors import Shape
from bslora_convert.modules.names import layer_of
from bslora_convert.vllm.settings import ANY

HEADERS = "*.safetensors"
CONSOLIDATED = "consolidated"  # a second copy of the weights, under other names


def check_name(said: str | None, served: str, aliases: Collection[str]) -> None:
    """Refuses an adapter that says that it is for another base; one that says nothing is taken.

    :raises Refused: naming both.
    """
    if said is None or ANY in aliases or last_part(said) in {last_part(name) for name in (served, *aliases)}:
        return
    raise Refused(
        f"it is for the base model {said}, and {served} is served; if they are the same, say so in BSLORA_BASE_ALIASES"
    )


def check_shapes(modules: Mapping[str, Entry], shapes: Mapping[str, Shape]) -> None:
    """Refuses an adapter for layers that the base does not have, or has in another size.

    shapes: of the base's matrices by name of the module, whichever way round; empty where they are not known. A module may have
    another beginning there (`language_model.`), a head may be tied and experts stacked, so that neither is there by its name.

    :raises Refused: naming the first module.
    """
    if not shapes:
        return
    ends: dict[tuple[str, ...], set[Shape]] = {}
    for name, shape in shapes.items():
        ends.setdefault(_end(name), set()).add(shape)
    for name, entry in modules.items():
        found = {shapes[name]} if name in shapes else ends.get(_end(name), set())
        if not found and (EXPERT.search(name) or layer_of(name) is None):
            continue
        if not found:
            raise Refused(f"the base model has no {name}: it was made for another one")
        if not found & {entry.shape, entry.shape[::-1]}:
            rows, width = min(found)
            raise Refused(
                f"{name} is {rows} x {width} in the base model and {entry.shape[0]} x {entry.shape[1]} in the adapter: it was "
                "made for a model of another size"
            )


def _end(name: str) -> tuple[str, ...]:
    """A name from its numbered layer on, whatever it begins with."""
    return tuple(split(name)[1].split("."))


def shapes_of(base: str) -> dict[str, Shape]:
    """(out, in) of the base's matrices by module, from the headers of its files; empty where it is not here or quantised."""
    place = _place(base)
    if place is None:
        return {}
    found: dict[str, Shape] = {}
    for path in sorted(place.glob(HEADERS)):
        if path.name.startswith(CONSOLIDATED):
            continue
        try:
            headers = read_headers(path)
        except BsloraConvertError:
            return {}
        for key, tensor in headers.items():
            if not key.endswith(".weight") or tensor.ndim != 2:
                continue
            if tensor.dtype not in FLOATS:  # packed: its shape says nothing
                return {}
            found[key.removesuffix(".weight")] = (tensor.shape[0], tensor.shape[1])
    return found


def _place(base: str) -> Path | None:
    """Where a base model's files are: a directory, or the hub's cache."""
    if Path(base).is_dir():
        return Path(base)
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(base, "config.json")
    except (ImportError, ValueError):  # the hub's validation error is a ValueError
        return None
    return Path(found).parent if isinstance(found, str) else None


def last_part(name: str) -> str:
    """What is compared of a base model's name: its last part, whatever parts it, without case, `_` as `-`."""
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1].lower().replace("_", "-")
