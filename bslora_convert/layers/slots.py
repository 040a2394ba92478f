"""What a server reserves for an adapter: a slot of one rank for every module that it makes room for, whatever the file holds.

    step · Σ (out + in) numbers of two bytes, over `reserved`

step is the least rank allowed that holds the adapter's largest. vLLM 0.32.0 (`lora/model_manager.py`) makes room in every linear
layer of the base, and in the embeddings of some, unless `--lora-target-modules` names kinds: then in those, in all layers, and in
what it packs with them (`PACKED`). With the kinds of the adapter, `target_modules`, that is what is counted here.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from bslora_convert.modules.names import place_of

if TYPE_CHECKING:  # the steps are asked for where torch is not wanted
    from bslora_convert.modules.factors import Shape

STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's allowed max_lora_rank
NUMBER_BYTES = 2  # bf16 and fp16 slots
PACKED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # kinds whose room is made together
PARENTS = ("qkv_proj", "gate_up_proj")  # what the engine calls them together
TARGET_MODULES = "--lora-target-modules"


def step_of(rank: int) -> int | None:
    """The least allowed slot rank that holds `rank`, None where none does."""
    return next((step for step in STEPS if step >= rank), None)


def target_modules(names: Collection[str]) -> list[str] | None:
    """The kinds of an adapter's modules as `--lora-target-modules` names them; None where it has experts."""
    if any(".experts." in f".{name}." for name in names):
        return None
    return sorted({name.rpartition(".")[2] for name in names})


def left_out(names: Collection[str], told: Collection[str]) -> list[str]:
    """Kinds of an adapter's modules that an engine which was told others makes no room for, and so never applies."""
    with_mates = {mate for group in PACKED for kind in group if kind in told for mate in group}
    by_parent = {kind for parent, group in zip(PARENTS, PACKED, strict=True) if parent in told for kind in group}
    return sorted(set(target_modules(names) or ()) - {*told, *with_mates, *by_parent})


def reserved(shapes: "Mapping[str, Shape]") -> "dict[str, Shape]":
    """The modules that room is made for, with their shapes.

    They are the adapter's, their kinds in all layers, and what is packed with them. A layer is as large as the first one that has
    the kind; of packed kinds that no layer has, k is as large as v, gate as up, k and v at most as q, and q is square. There are
    as many layers as the largest number says.

    shapes: (out, in) of the adapter's modules.
    """
    found = dict(shapes)
    stacks: dict[str, int] = {}
    kinds: dict[tuple[str, str], Shape] = {}
    for name, shape in shapes.items():
        if (place := place_of(name)) is not None:
            stack, number, kind = place
            stacks[stack] = max(stacks.get(stack, 0), number)
            kinds.setdefault((stack, kind), shape)
    for (stack, kind), shape in list(kinds.items()):
        before, dot, last = kind.rpartition(".")
        for group in PACKED:
            for mate in group if last in group else ():
                out, width = kinds.get((stack, f"{before}{dot}v_proj"), shape) if mate == "k_proj" else shape
                kinds.setdefault((stack, f"{before}{dot}{mate}"), (width, width) if mate == "q_proj" else (out, width))
    for (stack, kind), shape in kinds.items():
        for at in range(stacks[stack] + 1):
            found.setdefault(f"{stack}.{at}.{kind}", shape)
    return found


def width_of(shapes: "Mapping[str, Shape]") -> int:
    """Σ (out + in) over what room is made for."""
    return _sum(reserved(shapes).values())


def bytes_of(step: int, width: int) -> int:
    """Bytes of one slot."""
    return step * width * NUMBER_BYTES


def slot_bytes(shapes: "Mapping[str, Shape]", rank: int) -> dict[str, int]:
    """Bytes of one server slot for each allowed slot rank that holds `rank`."""
    width = width_of(shapes)
    return {str(step): bytes_of(step, width) for step in STEPS if step >= rank}


def _sum(shapes: "Iterable[Shape]") -> int:
    return sum(out + across for out, across in shapes)
