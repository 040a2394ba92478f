"""The compact adapter as a module in training: its tensors are the parameters, the base stays frozen beside it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.divergence import kl_rows
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.prompts import Batch
from bslora_convert.behaviour.quantiser import Quantiser
from bslora_convert.bslora.layout import Layout
from bslora_convert.bslora.tensors import assemble
from bslora_convert.errors import RecipeError
from bslora_convert.lora.tables import Rows
from bslora_convert.recipe.training import Training


class Student(nn.Module):
    """The compact adapter on the base as a module whose parameters are what is trained."""

    def __init__(
        self,
        base: BaseModel,
        tensors: dict[str, Tensor],
        layout: Layout,
        train: str,
        carried: Mapping[str, Tensor | Rows],
    ) -> None:
        """The tensors that `train` names become the parameters.

        tensors: the adapter's, by key without PEFT's prefix, float32.
        carried: whole weights of the original, which the compact adapter carries along unchanged.

        :raises RecipeError: when the adapter has no such part.
        """
        super().__init__()
        self.base = (base,)  # in a tuple: the frozen base is none of the module's parameters
        chosen = [
            name
            for name, tensor in tensors.items()
            if tensor.numel() and (train == "all" or ("bslora_local" in name) == (train == "local"))
        ]
        if not chosen:
            raise RecipeError(f"train is {train!r}, but the adapter has no such part; use local or all", "train")
        self.parameters_by_place = nn.ParameterList([nn.Parameter(tensors[name]) for name in chosen])
        self.trained = dict(zip(chosen, self.parameters_by_place, strict=True))
        self.tensors: dict[str, Tensor] = {**tensors, **self.trained}
        self.attached = Attached(
            base.model, assemble(layout, self.tensors), carried, "the compact adapter", enabled=False
        )

    def forward(self, batch: Batch, hidden: Tensor, logits: Tensor, training: Training) -> Tensor:
        """Summed loss of a batch; hidden, logits: the reference's. `attached` is on, and stays on in the backward pass."""
        own_hidden, own = self.base[0].predictions(batch, gradients=True)
        loss = training.temperature**2 * kl_rows(logits, own, training.temperature).sum()
        if training.hidden_weight:
            lost = (own_hidden.float() - hidden.float()).square().sum() / hidden.float().square().sum()
            loss = loss + training.hidden_weight * len(batch.targets) * lost
        return loss

    @contextmanager
    def rounded(self, quantiser: Quantiser) -> Iterator[None]:
        """Inside, the adapter holds what would be stored."""
        exact = {name: tensor.detach().clone() for name, tensor in self.trained.items()}
        kept = quantiser.round(exact)
        for name, tensor in self.trained.items():
            tensor.data.copy_(kept[name])
        try:
            yield
        finally:
            for name, tensor in self.trained.items():
                tensor.data.copy_(exact[name])
