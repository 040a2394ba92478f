"""The forward pass of one module's update, part by part and never expanded.

    y + B_l (A_l x) + Σ T(B_s A_s) x        a term of slice, gate or Kronecker kind costs what its own structure costs

Rows are tokens: x (n, in), y (n, out).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from bslora_convert.bslora.transforms import Transform
from bslora_convert.modules.factors import Factors, Use


def add_update(y: Tensor, x: Tensor, local: Factors, transform: Transform | None, uses: Sequence[Use]) -> Tensor:
    """Adds a linear layer's update, y + ΔW x, in the dtype of the factors, and returns it in y's.

    y (…, out): the base layer's output; its memory is used again where no gradient is asked for. x (…, in): the layer's input.
    """
    dtype = local.a.dtype
    rows = x.to(dtype).flatten(0, -2)
    result = y.to(dtype).flatten(0, -2)
    if torch.is_grad_enabled():
        result = result.clone()
    if local.rank:
        result.addmm_(linear(rows, local.a), local.b.T)
    if transform is not None:
        result = transform.add_(result, rows, uses)
    return result.to(y.dtype).view(y.shape)


def add_lookup(
    y: Tensor,
    ids: Tensor,
    local: Factors,
    transform: Transform | None,
    uses: Sequence[Use],
    scale: Tensor | float | None = None,
) -> Tensor:
    """Adds an embedding's update, y + (columns `ids` of ΔW): local a (r, vocabulary), b (dim, r); y (…, dim), ids (…).

    scale: what the layer multiplies its rows by, as Gemma's does.
    """
    result = y.to(local.a.dtype)
    for part in (local, *_terms(local, transform, uses)):
        found = embedding(ids, part.a.T) @ part.b.T
        result = result + (found if scale is None else found * scale)
    return result.to(y.dtype)


def add_head(y: Tensor, x: Tensor, local: Factors, transform: Transform | None, uses: Sequence[Use]) -> Tensor:
    """Adds what an embedding's update is for the head that its weight is tied to, y + ΔWᵀ x: x (…, dim), y (…, vocabulary)."""
    result, rows = y.to(local.a.dtype), x.to(local.a.dtype)
    for part in (local, *_terms(local, transform, uses)):
        result = result + (rows @ part.b) @ part.a
    return result.to(y.dtype)


def dense(local: Factors, transform: Transform | None, uses: Sequence[Use]) -> Tensor:
    """ΔW itself (out, in), in the dtype of the factors."""
    total = local.b @ local.a
    for part in _terms(local, transform, uses):
        total = torch.addmm(total, part.b, part.a)
    return total


def _terms(local: Factors, transform: Transform | None, uses: Sequence[Use]) -> list[Factors]:
    return [transform.factors(pair, own, local.shape) for pair, own in uses] if transform is not None else []
