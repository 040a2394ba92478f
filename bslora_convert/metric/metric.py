"""A metric on a module's update that is known on its factors alone, for parts that leave their span: those of codes.

    E‖(ΔW − ΔŴ) x‖²,  Σ = E[x xᵀ],  known: M = A Σ Aᵀ (q×q) and tr Σ = E‖x‖²

Truncation stays within the rows of A, where M says everything. The rounding of codes goes in every direction of the d inputs, so
Σ is completed with what is least known about the rest, its mean power. With A Aᵀ = V diag(λ) Vᵀ and Q = λ^-½ Vᵀ A the orthonormal
basis of A's rows,

    Σ̃ = Qᵀ S Q + ρ (1 − QᵀQ),    S = λ^-½ Vᵀ M V λ^-½,    ρ = (tr Σ − tr S) / (d − rank)

which agrees with Σ on the rows of A and has its trace. A vector x is weighed by its root, d×q and never d×d:

    Σ̃^½ x = √ρ x + Qᵀ (S^½ − √ρ) Q x

The same holds for outputs with the gradient g in the place of x and Bᵀ in that of A; without gradients outputs count as they are.

The noise of codes comes in all directions of the inputs alike. Of such N, with entries of variance ν, what changes the loss is
E(gᵀNx)² = ν E‖x‖²‖g‖², and by the same token a part of it in some directions of the outputs: `output_metric` completes
E[‖x‖² (Bᵀg)(Bᵀg)ᵀ] / d and counts inputs as they are, so that modules weigh as much as they are fed and felt together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bslora_convert.modules.factors import Factors
from bslora_convert.modules.lowrank import gram, null_share

Weigh = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of one module's factors b (out, q), a (q, in), float64.

    inputs: E[(Ax)(Ax)ᵀ] (q, q), input_power: E‖x‖². outputs: E[(Bᵀg)(Bᵀg)ᵀ] (q, q), output_power: E‖g‖²; None where outputs
    count as they are. fed, fed_power: of the outputs, with each token's ‖x‖² as its weight.
    """

    inputs: Tensor
    input_power: float
    outputs: Tensor | None = None
    output_power: float = 0.0
    fed: Tensor | None = None
    fed_power: float = 0.0


def as_it_is(vectors: Tensor) -> Tensor:
    """No weighing."""
    return vectors


@dataclass(frozen=True, slots=True)
class Metric:
    """How vectors of the two sides of an update are weighed, (n, out) and (n, in); lengths of products of the results count."""

    left: Weigh = as_it_is
    right: Weigh = as_it_is

    def weighed(self, factors: Factors) -> Factors:
        """The product with both sides weighed."""
        return Factors(self.left(factors.b.T).T, self.right(factors.a))


PLAIN = Metric()


def output_metric(factors: Factors, moments: Moments) -> Metric:
    """The metric of outputs alone, each token as strong as what it feeds the module."""
    assert moments.fed is not None  # there were gradients
    width = factors.a.shape[1]
    return Metric(_completed(factors.b.T, moments.fed / width, moments.fed_power / width))


def _completed(rows: Tensor, moment: Tensor, power: float) -> Weigh:
    """Σ̃^½ as a function. rows (q, d), moment (q, q), power tr Σ."""
    if not len(rows):
        return as_it_is  # of nothing
    moment = moment.to(rows.device)
    values, vectors = torch.linalg.eigh(gram(rows.T))
    share = null_share(torch.promote_types(rows.dtype, torch.float32), len(rows))
    kept = values > share * values.max().clamp_min(torch.finfo(values.dtype).tiny)
    onto = vectors[:, kept] / values[kept].sqrt()
    basis = onto.T.to(rows.dtype) @ rows
    within = onto.T @ moment @ onto
    rest = rows.shape[1] - basis.shape[0]
    floor = (max(power - float(within.diagonal().sum()), 0.0) / rest) ** 0.5 if rest else 0.0
    squares, axes = torch.linalg.eigh((within + within.T) / 2)
    root = (axes * squares.clamp_min(0).sqrt()) @ axes.T
    inner = (root - floor * torch.eye(len(root), dtype=root.dtype, device=root.device)).to(rows.dtype)

    def weigh(vectors: Tensor) -> Tensor:
        found: Tensor = floor * vectors + vectors @ basis.T @ inner @ basis
        return found

    return weigh


def metric_of(factors: Factors, moments: Moments) -> Metric:
    """The metric of moments that were taken of these factors: of inputs, and of outputs' gradients where there were any."""
    inputs = input_metric(factors, moments)
    if moments.outputs is None:
        return inputs
    return Metric(_completed(factors.b.T, moments.outputs, moments.output_power), inputs.right)


def input_metric(factors: Factors, moments: Moments) -> Metric:
    """The metric of inputs alone."""
    return Metric(right=_completed(factors.a, moments.inputs, moments.input_power))


PLAIN_NAME = "plain"
METRICS: Mapping[str, Callable[[Factors, Moments], Metric]] = {
    "output": output_metric,
    "input": input_metric,
    "two-sided": metric_of,
}
