"""Adapters that were drawn alike, whoever knows their seed: found by cosine, and what they have in common.

    Ā_m = mean over siblings i of A_im / ‖A_im‖             A₀ of module m, up to a scale, as near as they are many

Random A's of n numbers have a cosine of about 1/√n; siblings' are near one. A mean of three is worth as much as the seed: what
training put into all of them is in it too.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from bslora_convert.initialisation.drawn import Module
from bslora_convert.initialisation.kept import draws_at
from bslora_convert.initialisation.match import bar
from bslora_convert.initialisation.stream import Place
from bslora_convert.modules.factors import Shape

SKETCHED, HEAD = 8, 1024  # modules of a sketch, numbers of each
TINY = 1e-30


def sketch(modules: Mapping[str, Module]) -> tuple[tuple[str, ...], Tensor]:
    """What siblings are known by: names and shapes of the modules, and some numbers of some A's, of unit length each."""
    linear = {name: module for name, module in modules.items() if module.kind == "linear" and module.size}
    names = sorted(linear)
    signature = tuple(f"{name} {tuple(linear[name].a.shape)}" for name in names)
    step = max(len(names) // SKETCHED, 1)
    heads = [linear[name].a.reshape(-1)[:HEAD].double() for name in names[::step][:SKETCHED]]
    return signature, torch.cat([head / head.norm().clamp_min(TINY) for head in heads] or [torch.zeros(0)])


def alike(first: Tensor, second: Tensor) -> bool:
    """Whether two sketches of one signature are of siblings."""
    cosine = float(first @ second) / max(float(first.norm() * second.norm()), TINY)
    return cosine >= bar(max(len(first), 1))


def clusters(sketches: Sequence[Tensor]) -> list[list[int]]:
    """Siblings among sketches of one signature: each with the first of a cluster that it is like, by number."""
    found: list[list[int]] = []
    for index, one in enumerate(sketches):
        for members in found:
            if alike(sketches[members[0]], one):
                members.append(index)
                break
        else:
            found.append([index])
    return found


def mean(siblings: Sequence[Mapping[str, Module]]) -> dict[str, Tensor]:
    """Ā (r, in) of every linear module, float32, in the order of the first sibling's."""
    found = {}
    for name, first in siblings[0].items():
        if first.kind == "linear" and first.size:
            total = torch.zeros_like(first.a, dtype=torch.float64)
            for one in siblings:
                a = one[name].a.double()
                total += a / a.norm().clamp_min(TINY)
            found[name] = total.float() / len(siblings)
    return found


def in_common(
    vectors: Mapping[str, Tensor], file: str, shapes: Mapping[str, Shape]
) -> tuple[dict[str, Place], dict[str, float]]:
    """(Places in a file, cosines) of the tensors that are like it, by key.

    vectors: rows of A, columns of B. shapes: (vectors, length) of the file's tensors, in its order.
    """
    places: dict[str, Place] = {}
    cosines: dict[str, float] = {}
    first = 0
    for key, (count, length) in shapes.items():
        place, first = Place(first, count), first + count * length
        own = vectors.get(key)
        if own is None or tuple(own.shape) != (count, length):
            continue
        (numbers,), _ = draws_at(file, [(place.first, count * length)])
        cosine = _cosine(own, torch.from_numpy(numbers.astype(np.float64)).view(count, length))
        if cosine >= bar(count * length):
            places[key], cosines[key] = place, cosine
    return places, cosines


def _cosine(a: Tensor, draws: Tensor) -> float:
    """Of rows, each draw in its own units: √ of the share of A's energy along them."""
    a = a.double()
    along = (a * draws).sum(1).square() / draws.square().sum(1).clamp_min(TINY)
    return float((along.sum() / a.square().sum().clamp_min(TINY)).sqrt()) if float((a * draws).sum()) > 0 else 0.0
