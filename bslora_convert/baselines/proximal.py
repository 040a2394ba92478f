"""One exact least-squares step that can't raise its objective, however badly its system is conditioned."""

import torch
from torch import Tensor

RIDGE = 1e-12  # of the largest diagonal entry


def toward_optimum(normal: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """`old` moved to the minimum of xᵀ N x − 2 xᵀ right: (…, p, p), (…, p, n), (…, p, n) -> (…, p, n).

    Solves (N + ε I) change = right − N old. With any ε the objective falls by at least ε ‖change‖²; what N doesn't determine
    stays as it was.
    """
    ridge = RIDGE * normal.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(torch.finfo(normal.dtype).tiny / RIDGE)
    identity = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    factor, failed = torch.linalg.cholesky_ex(normal + ridge[..., None, None] * identity)
    change = torch.cholesky_solve(right - normal @ old, factor)
    solved = (failed == 0)[..., None, None] & torch.isfinite(change)
    return old + torch.where(solved, change, torch.zeros_like(change))
