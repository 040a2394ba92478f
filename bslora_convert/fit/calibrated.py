"""Local parts refitted in the metric of what the adapter is fed, exactly and without a d×d matrix.

    objective    Σ_m E‖(ΔW_m − ΔŴ_m) x‖²,  x the inputs of module m

With what sharing leaves of a module held as factors, ΔW − T = B A with B (out, q), A (q, in), the objective of a local part B̂Â is
‖(BA − B̂Â) Σ^½‖², Σ = E[x xᵀ]. The best of rank k is U_k U_kᵀ B A, U_k the leading left singular vectors of B A Σ^½, whose Gram
matrices are BᵀB and A Σ Aᵀ = E[(Ax)(Ax)ᵀ], both q×q: the truncated SVD of `lowrank` with the second one in the place of A Aᵀ.
The two-sided metric weighs outputs as well: with g the gradient at the module's output, E[(Bᵀg)(Bᵀg)ᵀ] in the place of BᵀB.

Ranks are given to the modules by the same greedy order on the spectra of this metric. Shared parts stay as they were fitted.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from bslora_convert.bslora.form import LEVELS, BsloraForm
from bslora_convert.fit import allocate
from bslora_convert.fit.lowrank import Delta, Grams, ProductSvd, combine, gram, product_svd
from bslora_convert.metric.metric import Moments
from bslora_convert.modules.factors import Factors, add


def residual_terms(deltas: Mapping[str, Delta], form: BsloraForm) -> dict[str, list[Factors]]:
    """What local parts have to hold, by module: the module's own factors, and its shared parts taken away."""
    terms: dict[str, list[Factors]] = {}
    for name, delta in deltas.items():
        shared = (form.part(name, level) for level in LEVELS)
        terms[name] = [delta.factors(), *(Factors(-part.b, part.a) for part in shared if part is not None)]
    return terms


def metric_svd(target: Factors, moments: Moments) -> ProductSvd:
    """SVD of the module's target in the metric of moments that were taken of its factors."""
    own = moments.to(target.b.device)
    return product_svd(Grams(gram(target.b) if own.outputs is None else own.outputs, own.inputs))


def refit_locals(
    form: BsloraForm, terms: Mapping[str, list[Factors]], moments: Mapping[str, Moments], uniform: bool
) -> BsloraForm:
    """The form with local parts of the same numbers in all, best in the metric of these moments.

    terms: from `residual_terms`. uniform: every module keeps its rank; otherwise ranks go where they gain most.
    """
    svds = {name: metric_svd(add(*parts), moments[name]) for name, parts in terms.items()}
    ranks = {name: module.local.rank for name, module in form.modules.items()}
    if not uniform:
        costs = {name: sum(module.shape) for name, module in form.modules.items()}
        spectra = {name: svd.energies for name, svd in svds.items()}
        ranks = allocate.within_budget(spectra, costs, allocate.cost_of(ranks, costs))
    modules = {}
    for name, module in form.modules.items():
        left, right = svds[name].balanced(ranks[name])
        local = _balanced(combine(terms[name], left, right)).to(module.local.b.dtype)
        modules[name] = replace(module, local=local)
    return replace(form, modules=modules)


def _balanced(factors: Factors) -> Factors:
    """The same product with columns of b and rows of a of equal length; the metric's own balance may be far from that."""
    lengths = factors.a.norm(dim=1) / factors.b.norm(dim=0)
    scale = torch.where(torch.isfinite(lengths) & (lengths > 0), lengths, torch.ones_like(lengths)).sqrt()
    return Factors(factors.b * scale, factors.a / scale[:, None])
