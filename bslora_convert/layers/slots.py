"""What a server reserves for an adapter: a slot of one rank for every module, whatever the adapter's own ranks and its file.

A slot takes step · Σ (out + in) numbers of two bytes, where step is the least rank allowed that holds the adapter's largest.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the steps are asked for where torch is not wanted
    from bslora_convert.modules.factors import Shape

STEPS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's allowed max_lora_rank
NUMBER_BYTES = 2  # bf16 and fp16 slots


def step_of(rank: int) -> int | None:
    """The least allowed slot rank that holds `rank`, None where none does."""
    return next((step for step in STEPS if step >= rank), None)


def width_of(shapes: "Iterable[Shape]") -> int:
    """Σ (out + in) over the modules."""
    return sum(out + across for out, across in shapes)


def bytes_of(step: int, width: int) -> int:
    """Bytes of one slot."""
    return step * width * NUMBER_BYTES


def slot_bytes(shapes: "Mapping[str, Shape]", rank: int) -> dict[str, int]:
    """Bytes of one server slot for each allowed slot rank that holds `rank`."""
    width = width_of(shapes.values())
    return {str(step): bytes_of(step, width) for step in STEPS if step >= rank}
