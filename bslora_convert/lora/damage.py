"""What the factors themselves show of a training or a saving that went wrong: no reason to refuse, but to tell.

An update that is zero is one. Others are seen in many modules: rows of B or columns of A that are exactly zero, rows of A that
are zero although their columns of B are not (both as one of several processes leaves them that saved its own part only), rows of
A that are equal. Ranks that are filled up with zeros have zeros in A and in B, and are none.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from bslora_convert.files.record import named
from bslora_convert.lora.module import LoraModule
from bslora_convert.notes import Note

FEWEST = 2  # modules that show the same, and at least half of all
PART = Fraction(1, 8)  # of a module's rows


def damage(modules: Mapping[str, LoraModule], carried: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Notes on what the numbers show; none of headers alone."""
    if any(module.a.is_meta for module in modules.values()):
        return ()
    shapes = {name: module for name, module in modules.items() if module.a.numel() and module.b.numel()}
    found = _nothing(shapes) or [
        words for looked in (_rows, _columns, _half, _equal) if (words := _said(looked(shapes), shapes))
    ]
    return tuple(str(Note(words, "attention")) for words in (*found, *_heads(carried)))


def _nothing(modules: Mapping[str, LoraModule]) -> Sequence[str]:
    """Why the update is zero everywhere."""
    if modules and all(module.scaling == 0 for module in modules.values()):
        return ["lora_alpha is 0, so that the scaling is zero and with it the update, whatever was trained"]
    sides = {"B": [module.b for module in modules.values()], "A": [module.a for module in modules.values()]}
    return [
        f"every {side} is zero, and with it the update: it was never trained, or saved before it was"
        for side, factors in sides.items()
        if factors and not any(bool(factor.any()) for factor in factors)
    ]


def _heads(carried: Mapping[str, Tensor]) -> Sequence[str]:
    """Saved modules without numbers."""
    zero = [name for name, tensor in carried.items() if name.endswith(".weight") and not bool(tensor.any())]
    return [f"{named(zero)} of the saved modules {'is' if len(zero) == 1 else 'are'} zero everywhere"] if zero else []


Found = tuple[str, Mapping[str, Fraction]]  # what it is of a module (its part before it), and how much of each


def _rows(modules: Mapping[str, LoraModule]) -> Found:
    return "of the rows of B are exactly zero", {name: _zero(module.b, 1) for name, module in modules.items()}


def _columns(modules: Mapping[str, LoraModule]) -> Found:
    return "of the columns of A are exactly zero", {name: _zero(module.a, 0) for name, module in modules.items()}


def _half(modules: Mapping[str, LoraModule]) -> Found:
    def part(module: LoraModule) -> Fraction:
        a, b = module.a.abs().amax(1) == 0, module.b.abs().amax(0) == 0
        return Fraction(int((a & ~b).sum()), len(a))

    words = "of the rows of A are exactly zero although their columns of B are not"
    return words, {name: part(module) for name, module in modules.items()}


def _equal(modules: Mapping[str, LoraModule]) -> Found:
    def part(module: LoraModule) -> Fraction:
        rows = module.a[module.a.abs().amax(1) > 0]
        return Fraction(len(rows) - len(rows.unique(dim=0)), module.rank) if len(rows) > 1 else Fraction(0)

    return "of the rows of A repeat another row", {name: part(module) for name, module in modules.items()}


def _zero(factor: Tensor, along: int) -> Fraction:
    """The share of a factor's rows (along 1) or columns (along 0) that are zero."""
    zero = factor.abs().amax(along) == 0
    return Fraction(int(zero.sum()), len(zero))


def _said(found: Found, modules: Mapping[str, LoraModule]) -> str | None:
    """A sentence, where enough of the modules show it."""
    words, parts = found
    having = {name: part for name, part in parts.items() if part >= PART}
    if len(having) < max(FEWEST, len(modules) / 2):
        return None
    least, *_, most = sorted(having.values())
    much = f"{float(least):.0%}" if least == most else f"{float(least):.0%} to {float(most):.0%}"
    return (
        f"in {len(having)} of {len(modules)} modules {much} {words}, for example in {next(iter(having))}: so they are left where "
        "one of several processes saves its own part only (FSDP); compare with the training's own evaluation"
    )
