"""The forward pass of one module's update, part by part and never expanded.

    y + B_l (A_l x) + Σ T(B_s A_s) x        a term of slice, gate or Kronecker kind costs what its own structure costs

Rows are tokens: x (n, in), y (n, out).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from bslora_convert.bslora.factors import Factors
from bslora_convert.bslora.transforms import Transform

Term = tuple[Transform, Factors, Mapping[str, Tensor]]  # a shared pair as one module uses it


def add_update(y: Tensor, x: Tensor, local: Factors, terms: Iterable[Term] = ()) -> Tensor:
    """Adds a linear layer's update: y + ΔW x, in the dtype of the factors, returned in y's.

    y (…, out): the base layer's output. x (…, in): its input.
    """
    dtype = local.a.dtype
    rows = x.flatten(0, -2).to(dtype)
    result = y.flatten(0, -2).to(dtype)
    if local.rank:
        result = torch.addmm(result, rows @ local.a.T, local.b.T)
    for transform, pair, own in terms:
        result = transform.add(result, rows, pair, own)
    return result.to(y.dtype).reshape(y.shape)


def add_lookup(y: Tensor, ids: Tensor, local: Factors, terms: Iterable[Term] = ()) -> Tensor:
    """Adds an embedding's update: y + (columns `ids` of ΔW), local a (r, vocabulary), b (dim, r); y (…, dim), ids (…)."""
    shape = local.shape
    parts = [local, *(transform.factors(pair, own, shape) for transform, pair, own in terms)]
    result = y.to(local.a.dtype)
    for part in parts:
        result = result + torch.nn.functional.embedding(ids, part.a.T) @ part.b.T
    return result.to(y.dtype)


def dense(local: Factors, terms: Iterable[Term] = ()) -> Tensor:
    """ΔW itself (out, in), in the dtype of the factors."""
    total = local.b @ local.a
    for transform, pair, own in terms:
        part = transform.factors(pair, own, local.shape)
        total = torch.addmm(total, part.b, part.a)
    return total
