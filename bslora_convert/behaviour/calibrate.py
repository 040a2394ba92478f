"""One streaming pass over prompts: second moments of what each module's factors see, never a d×d matrix.

inputs   E[(Ax)(Ax)ᵀ]     x the module's inputs, over all tokens, the original adapter active
outputs  E[(Bᵀg)(Bᵀg)ᵀ]   g the gradient of the completions' negative log-likelihood at the module's output
fed      E[‖x‖² (Bᵀg)(Bᵀg)ᵀ]

and E‖x‖², E‖g‖², E‖x‖²‖g‖², which say how much there is outside of what the factors see.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.prompts import Batch, Example, batches
from bslora_convert.layers.names import layers_of
from bslora_convert.metric.metric import Moments
from bslora_convert.modules.factors import Factors


def collect(
    base: BaseModel,
    reference: Attached,
    factors: Mapping[str, Factors],
    examples: Sequence[Example],
    batch_size: int,
    gradients: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Moments]:
    """Moments of each module's factors b (out, q), a (q, in), with the reference active on the base.

    gradients: with a backward pass for the outputs.
    """
    sums = {name: _Sum(part, base.device) for name, part in factors.items()}
    done = 0
    with reference:
        for batch in batches(examples, batch_size, base.pad):
            with _watching(base.model, sums, batch.mask.bool(), gradients):
                if gradients:
                    _backward(base, batch)
                else:
                    base.predictions(batch)
            done += len(batch.examples)
            progress(done)
    return {name: total.moments(gradients) for name, total in sums.items()}


class _Sum:
    """Moments of one module as they grow."""

    def __init__(self, factors: Factors, device: torch.device) -> None:
        q = factors.rank
        self.factors = factors.to(torch.float32, device)
        self.inputs = torch.zeros((q, q), dtype=torch.float64, device=device)
        self.outputs, self.fed = (torch.zeros((q, q), dtype=torch.float64, device=device) for _ in range(2))
        self.input_power = self.output_power = self.fed_power = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0

    def see_input(self, x: Tensor) -> Tensor:
        """Takes in x (n, in), or an embedding's token ids (n,), and returns ‖x‖² (n,)."""
        z = (self.factors.a.T[x] if x.ndim == 1 else x.float() @ self.factors.a.T).double()
        self.inputs.addmm_(z.T, z)
        power = _power(x) if x.is_floating_point() else torch.ones(len(x), dtype=torch.float64, device=x.device)
        self.input_power = self.input_power + power.sum()
        self.count += len(z)
        return power

    def see_gradient(self, g: Tensor, power: Tensor) -> None:
        """Takes in g (n, out). power: ‖x‖² (n,) of the inputs that it belongs to."""
        z, own = (g.float() @ self.factors.b).double(), _power(g)
        self.outputs.addmm_(z.T, z)
        self.fed.addmm_((power[:, None] * z).T, z)
        self.output_power = self.output_power + own.sum()
        self.fed_power = self.fed_power + power @ own

    def moments(self, gradients: bool) -> Moments:
        """The means, on the CPU."""
        count = max(self.count, 1)
        found = Moments((self.inputs / count).cpu(), float(self.input_power) / count)
        if not gradients:
            return found
        return replace(
            found,
            outputs=(self.outputs / count).cpu(),
            output_power=float(self.output_power) / count,
            fed=(self.fed / count).cpu(),
            fed_power=float(self.fed_power) / count,
        )


def _power(rows: Tensor) -> Tensor:
    """(n, size) -> (n,), float64."""
    return rows.float().square().sum(1, dtype=torch.float64)


@contextmanager
def _watching(model: nn.Module, sums: Mapping[str, _Sum], mask: Tensor, gradients: bool) -> Iterator[None]:
    """Every module's inputs (and the gradients at its output) go into its sum, padding left out."""

    def rows(tensor: Tensor, lead: int) -> Tensor:
        shape = tensor.shape[: tensor.ndim - lead]
        if shape == mask.shape:
            return tensor[mask.to(tensor.device)]
        return tensor.flatten(0, tensor.ndim - lead - 1)  # experts see their tokens without padding

    def hook(total: _Sum) -> Callable[..., None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            power = total.see_input(rows(x, int(x.is_floating_point())))
            if gradients:
                output.register_hook(lambda g: total.see_gradient(rows(g, 1), power))

        return see

    layers = layers_of(sums, model)
    with ExitStack() as stack:
        for name, total in sums.items():
            stack.callback(layers[name].register_forward_hook(hook(total)).remove)
        yield


def _backward(base: BaseModel, batch: Batch) -> None:
    """Gradients of the completions' negative log-likelihood at every module; no parameter gets any."""
    embeddings = base.model.get_input_embeddings()
    begin = lambda _, __, output: output.requires_grad_()  # noqa: E731  before whoever watches this layer
    handle = embeddings.register_forward_hook(begin, prepend=True)
    try:
        with torch.enable_grad():
            _, logits = base.predictions(batch, gradients=True)
            loss: Any = torch.nn.functional.cross_entropy(
                logits.float(), batch.targets.to(logits.device), reduction="sum"
            )
            loss.backward()
    finally:
        handle.remove()
