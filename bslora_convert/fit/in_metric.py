"""Local parts in a metric, exactly and without a d×d matrix.

    objective    Σ_m ‖G_m^½ (ΔW_m − shared parts − L_m) Σ_m^½‖²

With what sharing leaves of a module held as factors, ΔW − T = B A with B (out, q), A (q, in), the best L of rank k is the
truncated SVD of `lowrank` with the Gram matrices of the weighed factors, (G^½ B)ᵀ(G^½ B) and (A Σ^½)(A Σ^½)ᵀ, both q×q. Its
factors are combinations of B and A themselves, so that the metric is only ever asked about their span.

Ranks are given to the modules by the same greedy order on the spectra of this metric. Shared parts stay as they were fitted.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch

from bslora_convert.bslora.form import LEVELS, BsloraForm
from bslora_convert.fit import allocate
from bslora_convert.metric.metric import Metric
from bslora_convert.modules.factors import Factors, add
from bslora_convert.modules.lowrank import Delta, Grams, ProductSvd, combine, product_svd


def residual_terms(delta: Delta, form: BsloraForm, name: str) -> list[Factors]:
    """What a module's local part has to hold: the module's own factors, and its shared parts taken away."""
    shared = (form.part(name, level) for level in LEVELS)
    return [delta.factors(), *(Factors(-part.b, part.a) for part in shared if part is not None)]


def shared_rank(form: BsloraForm, name: str) -> int:
    """Rank of a module's shared parts, once expanded."""
    return form.expanded_rank(name) - form.modules[name].local.rank


def svd_in(metric: Metric, target: Factors) -> ProductSvd:
    """SVD of a product in a metric, in terms of its factors."""
    return product_svd(Grams.of(metric.weighed(target)))


def locals_in(
    metrics: Mapping[str, Metric], deltas: Mapping[str, Delta], form: BsloraForm, uniform: bool, most: int | None = None
) -> tuple[BsloraForm, float]:
    """The form with local parts of the same numbers in all, best in these metrics, and what it loses there.

    uniform: every module keeps its rank; otherwise ranks go where they gain most. most: greatest rank, shared parts counted.
    """
    terms = {name: residual_terms(delta, form, name) for name, delta in deltas.items()}
    svds = {name: svd_in(metrics[name], add(*parts)) for name, parts in terms.items()}
    ranks = {name: module.local.rank for name, module in form.modules.items()}
    spectra = {name: svd.energies for name, svd in svds.items()}
    if not uniform:
        costs = {name: sum(module.shape) for name, module in form.modules.items()}
        allowed = (
            spectra if most is None else {n: values[: most - shared_rank(form, n)] for n, values in spectra.items()}
        )
        ranks = allocate.within_budget(allowed, costs, allocate.cost_of(ranks, costs))
    modules = {}
    for name, module in form.modules.items():
        left, right = svds[name].balanced(ranks[name])
        local = balanced(combine(terms[name], left, right)).to(module.local.b.dtype)
        modules[name] = replace(module, local=local)
    return replace(form, modules=modules), allocate.lost_energy(spectra, ranks)


def balanced(factors: Factors) -> Factors:
    """The same product with columns of b and rows of a of equal length; the metric's own balance may be far from that."""
    lengths = factors.a.norm(dim=1) / factors.b.norm(dim=0)
    scale = torch.where(torch.isfinite(lengths) & (lengths > 0), lengths, torch.ones_like(lengths)).sqrt()
    return Factors(factors.b * scale, factors.a / scale[:, None])
