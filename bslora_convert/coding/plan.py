"""Which width everything that is coded gets, chosen with one Lagrange multiplier (`allocation`); nothing is coded here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bslora_convert.bslora.codes.coded import Vector
from bslora_convert.bslora.codes.widths import WIDTHS
from bslora_convert.coding.components import Components
from bslora_convert.coding.widths import Widths
from bslora_convert.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Plan:
    """The widths chosen.

    shared: by tensor key, each vector's width. locals: by module, each component's widths, None where it is left out.
    lost: the energy that they promise to lose, in the metric, weighed as it was allocated by. vectors: width and length of
    everything that is kept.
    """

    shared: Mapping[str, Sequence[int]]
    locals: Mapping[str, Sequence[Widths | None]]
    lost: float
    vectors: Sequence[Vector]


def plan(components: Components, *, bits: int | None = None, lost: float | None = None) -> Plan:
    """The widths of least loss within `bits`, or of the fewest bits that lose at most the energy `lost`.

    With neither the most precise widths that the target allows, for ranks or one width by hand.

    :raises RecipeError: when not even the least codes fit in the bits.
    """
    hull = components.hull
    if lost is not None:
        chosen = hull.within_loss(lost)
    elif bits is None:
        chosen = hull.finest
    else:
        found = hull.within_bits(bits)
        if found is None:
            raise RecipeError(
                f"bytes: {max(bits, 0) // 8} bytes can't hold the least codes of the shared parts; "
                "raise --bytes or use --transform none",
                "bytes",
            )
        chosen = found
    options = hull.options_at(chosen)
    shared: dict[str, list[int]] = {}
    vectors: list[Vector] = []
    for ((key, _), (vector, _)), option in zip(components.shared.items(), options, strict=False):
        shared.setdefault(key, []).append(WIDTHS[option])
        vectors.append((WIDTHS[option], vector.numel()))
    counts = [len(components.shared), *(len(local.hull.bits) for local in components.locals.values())]
    _, *parts = np.split(options, np.cumsum(counts)[:-1])
    locals_ = {
        name: [components.locals[name].options[option - 1] if option else None for option in part]
        for name, part in zip(components.locals, parts, strict=True)
    }
    for name, kept in locals_.items():
        vectors += components.locals[name].vectors([widths for widths in kept if widths])
    return Plan(shared, locals_, float(hull.energies_at(chosen).sum()), vectors)
