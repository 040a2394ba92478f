"""What an adapter's modules put out on prompts, as the sums that entropies are made of: three numbers a module are kept."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from bslora_convert.analysis.entropy import NOTHING, Pool
from bslora_convert.behaviour.prompts import Prompts, batches
from bslora_convert.behaviour.session import BaseModelSession
from bslora_convert.layers.names import layers_of
from bslora_convert.modules.factors import Factors


def activation_pools(session: BaseModelSession, prompts: Prompts) -> dict[str, Pool]:
    """Each module's update ΔW x over all tokens of the prompts, the adapter active: count, sum, sum of squares."""
    examples = session.encode(prompts).examples
    form = session.adapter.form
    pools = dict.fromkeys(form.modules, NOTHING)
    done = 0
    with session.reference:
        for batch in batches(examples, prompts.batch_size, session.base.pad):
            with _watching(session.base.model, form.modules, pools, batch.mask.bool()):
                session.base.predictions(batch)
            done += len(batch.examples)
            session.progress("reading activations", done, len(examples))
    return pools


@contextmanager
def _watching(model: nn.Module, modules: Mapping[str, object], pools: dict[str, Pool], mask: Tensor) -> Iterator[None]:
    def hook(name: str, factors: Factors) -> Callable[..., None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
            x = inputs[0]
            tokens = x[mask.to(x.device)] if x.shape[: mask.ndim] == mask.shape else x.flatten(0, -2)
            inner = (factors.a.T[tokens] if tokens.ndim == 1 else tokens.float() @ factors.a.T).double()
            sums = factors.b.double().sum(0) @ inner.sum(0)
            gram = factors.b.double().T @ factors.b.double()
            squares = float((gram * (inner.T @ inner)).sum())
            pools[name] += Pool(len(inner) * factors.b.shape[0], float(sums), squares)

        return see

    layers = layers_of(modules, model)
    with ExitStack() as stack:
        for name, module in modules.items():
            layer = layers[name]
            factors = module.local.to(torch.float32, next(layer.parameters()).device)  # type: ignore[attr-defined]
            stack.callback(layer.register_forward_hook(hook(name, factors)).remove)
        yield
