"""An adapter's factors in the shape that an engine takes, or why there is none.

Ranks are filled up with zeros, and so are layers that lack a kind of module; zeros change no update: `[B 0] [A; 0] = B A`.
"""

import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from bslora_convert.errors import Refused
from bslora_convert.lora.experts import stacked
from bslora_convert.lora.fused import ORDER, in_fused
from bslora_convert.modules.factors import Factors, Shape
from bslora_convert.modules.names import natural_order, place_of
from bslora_convert.notes import Note
from bslora_convert.serving.engines import Engine

SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
TOWER = re.compile(r"(^|\.)(vision_tower|vision_model|visual|vision_encoder|audio_tower|audio_model|image_encoder)\.")
WHOLE = ("modules_to_save", "trainable_token_indices", "ensure_weight_tying")  # an engine's reader stops at these


def reasons(engine: Engine, kinds: Mapping[str, str], carried: Collection[str], largest: int) -> list[str]:
    """Why an engine can't serve an adapter; empty where it can.

    kinds: by module. carried: names of tensors that are no factors. largest: rank of any module.
    """
    found = []
    other = next((name for name, kind in kinds.items() if kind not in engine.kinds), None)
    if other is not None:
        words = "an embedding whose head is tied to it" if kinds[other] == "tied_embedding" else "an embedding"
        found.append(
            f"{other} is {words}, and {engine.title} takes updates of {' and '.join(sorted(engine.kinds))} layers"
        )
    whole = [name for name in carried if not _is_copy(name) and name.partition(".")[0] not in engine.heads]
    if whole:
        found.append(f"it carries {whole[0]} whole, which {engine.title} does not load beside a LoRA")
    halves = sorted(holder for holder, count in Counter(h for h, _ in _parameters(kinds)).items() if count < len(ORDER))
    if halves and engine.experts:
        found.append(
            f"of {halves[0]} one parameter alone is adapted, and {engine.title} takes {' and '.join(ORDER)} together"
        )
    expert = None if engine.experts else next(iter((*stacked(kinds), *in_fused(kinds))), None)
    if expert is not None:
        found.append(f"{expert} belongs to a mixture of experts, which {engine.title} does not take one by one")
    unknown = [name for name in kinds if engine.modules and name.rpartition(".")[2] not in engine.modules]
    if unknown and expert is None:
        found.append(
            f"{unknown[0]} is none of the modules that {engine.title} knows: {', '.join(sorted(engine.modules))}"
        )
    if engine.rank(largest) is None:
        most = (engine.filled or engine.slots or (0,))[-1]
        found.append(
            f"rank {largest} is more than {most}, the largest that {engine.title} takes; give --rank {most} or less"
        )
    return found


def advice(engine: Engine, names: Collection[str], carried: Collection[str]) -> list[str]:
    """What an engine leaves out of an adapter that it loads, and what makes it do otherwise."""
    found = []
    for last, why in engine.ignored.items():
        ignored = [name for name in names if name.rpartition(".")[2] == last]
        if ignored:
            found.append(f"{engine.title} loads {len(ignored)} updates of {last} and never applies them: {why}")
    seeing = towers(names)
    if seeing and engine.towers:
        of = seeing[0].rpartition(".layers.")[0] or seeing[0]
        found.append(f"{engine.title} drops {len(seeing)} updates of {of} unless the server has {engine.towers}")
    if in_fused(names) and engine.fused:
        found.append(
            f"experts stand in the file as PEFT fuses them; where {engine.title} does not fuse a model's experts, start it with "
            f"{engine.fused}"
        )
    copies = [name for name in carried if _is_copy(name)]
    if copies:
        found.append(f"left out, for it is the base's own: {', '.join(copies)}")
    return [str(Note(said, "attention")) for said in found]


def towers(names: Collection[str]) -> list[str]:
    """The modules of a vision or audio tower."""
    return [name for name in names if TOWER.search(name)]


def heads(engine: Engine, carried: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of what an adapter carries whole, what the engine loads."""
    return {name: tensor for name, tensor in carried.items() if name.partition(".")[0] in engine.heads}


def _is_copy(name: str) -> bool:
    """Whether a carried tensor is a layer of the base that a LoRA is on, which PEFT saves where the vocabulary was resized."""
    return ".base_layer." in name


def _parameters(names: Collection[str]) -> set[tuple[str, str]]:
    """(Holder, parameter) of experts that PEFT has in a parameter."""
    return {(holder, parameter) for holder, parameter, _ in in_fused(names).values()}


def shaped(modules: Mapping[str, Factors], engine: Engine, layers: int | None = None) -> dict[str, Factors]:
    """The modules as the engine takes them, by name.

    layers: of the base model; the adapter's last one counts where that is not known.

    :raises Refused: when a layer lacks a kind of module whose shape differs from layer to layer.
    """
    found = filled_layers(modules, layers) if engine.every_layer else dict(modules)
    if not engine.one_rank:
        return found
    largest = max(1, *(factors.rank for factors in found.values()))
    rank = engine.rank(largest) or largest
    return {name: factors.padded(rank) for name, factors in found.items()}


def filled_layers(modules: Mapping[str, Factors], layers: int | None = None) -> dict[str, Factors]:
    """The modules with one of zeros wherever a layer lacks a kind that another layer has.

    :raises Refused: as `shaped`.
    """
    shapes: dict[tuple[str, str], Shape] = {}  # of (what the layers are called, kind)
    seen: dict[str, int] = {}
    for name, factors in modules.items():
        place = place_of(name)
        if place is None:
            continue
        stack, number, _ = place
        seen[stack] = max(seen.get(stack, 0), number)
        kind = (stack, place[2])
        if shapes.setdefault(kind, factors.shape) != factors.shape:
            raise Refused(
                f"{name} is {factors.shape[0]} x {factors.shape[1]}, and other layers have {kind[1]} of another size: layers "
                "without it can't be filled with zeros"
            )
    like = next(iter(modules.values())).b
    whole = dict(modules)
    for (stack, kind_name), (out, width) in shapes.items():
        for layer_number in range(max(seen[stack] + 1, layers or 0)):
            name = f"{stack}.{layer_number}.{kind_name}"
            if name not in whole:
                whole[name] = Factors(like.new_zeros((out, 1)), like.new_zeros((1, width)))
    return {name: whole[name] for name in sorted(whole, key=natural_order)}


def listed(config: Mapping[str, Any], modules: Mapping[str, object], whole: Collection[str] = ()) -> dict[str, Any]:
    """A configuration that names modules by the last parts of their names in a list, and nothing that only PEFT understands.

    whole: names of the tensors that stand in the file whole.
    """
    kept = {name: value for name, value in config.items() if name not in (*SELECTING, *WHOLE)}
    saved = {"modules_to_save": sorted({name.partition(".")[0] for name in whole})} if whole else {}
    experts = in_fused(list(modules))
    return kept | saved | {"target_modules": sorted({n.rpartition(".")[2] for n in modules if n not in experts})}
