"""How far the compact adapter's predictions are from the reference's, token by token, with teacher forcing.

Over the n measured tokens, p the reference's distribution, q the compact's, b the bare base's, in nats:

    kl        mean Σ_v p_v (log p_v − log q_v)        base_kl   mean Σ_v p_v (log p_v − log b_v)
    retention 1 − kl / base_kl                        agreement share of tokens with argmax p = argmax q
    hidden_error  ‖h_q − h_p‖ / ‖h_p − h_b‖           on the last hidden states, the base subtracted
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bslora_convert.behaviour.attach import Attached
from bslora_convert.behaviour.intervals import two_sided
from bslora_convert.behaviour.known import Known
from bslora_convert.behaviour.model import BaseModel
from bslora_convert.behaviour.prompts import Batch, Example, batches, shared_prefix
from bslora_convert.behaviour.rows import RowSums, means, resampled_means

TOKENS_AT_ONCE = 256  # rows of logits that are turned into probabilities together


@dataclass(slots=True)
class Divergence:
    """Sums over the measured tokens, and those of each row."""

    kl: list[Tensor] = field(default_factory=list)
    nll: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("base", "reference", "compact"), 0.0))
    hidden_lost: float = 0.0
    hidden_effect: float = 0.0
    rows: list[RowSums] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Measured tokens."""
        return sum(len(values) for values in self.kl)

    def add(self, batch: Batch, hidden: Mapping[str, Tensor], logits: Mapping[str, Tensor]) -> None:
        """Takes in one batch.

        hidden, logits: (n, d) and (n, vocabulary) of `reference`, `base` and `compact` at the measured positions.
        """
        found = torch.empty((len(batch.targets), 3), dtype=torch.float64)  # KL, the base's KL, agreed: of each token
        for start in range(0, len(found), TOKENS_AT_ONCE):
            here = slice(start, start + TOKENS_AT_ONCE)
            logs = {name: values[here].float().log_softmax(-1) for name, values in logits.items()}
            targets = batch.targets[here].to(logs["base"].device)
            for name, values in logs.items():
                self.nll[name] -= float(values.gather(1, targets[:, None]).double().sum())
            p = logs["reference"].exp()
            found[here, 0] = (p * (logs["reference"] - logs["compact"])).sum(-1).double().cpu()
            found[here, 1] = (p * (logs["reference"] - logs["base"])).sum(-1).double().cpu()
            found[here, 2] = (p.argmax(-1) == logs["compact"].argmax(-1)).double().cpu()
        self.kl.append(found[:, 0])
        self.hidden_lost += _energy(hidden["compact"] - hidden["reference"])
        self.hidden_effect += _energy(hidden["reference"] - hidden["base"])
        for index, example in enumerate(batch.examples):
            own = found[batch.rows == index]
            kl, base_kl, agreed = own.sum(0).tolist()
            self.rows.append(RowSums(example, len(own), kl, base_kl, int(agreed)))

    def to_dict(self, seed: int = 0) -> dict[str, Any]:
        """The fields of `verify.json`. seed: of the intervals, which are over rows."""
        whole, resampled = means(self.rows), resampled_means(self.rows, seed)
        nll = {name: value / self.tokens for name, value in self.nll.items()}
        return {
            "kl": float(whole.kl),
            "kl_ci95": list(two_sided(resampled.kl)),
            "kl_p99": max(0.0, float(np.quantile(torch.cat(self.kl).numpy(), 0.99))),
            "agreement": float(whole.agreement),
            "agreement_ci95": list(two_sided(resampled.agreement)),
            "nll": nll,
            "perplexity": {name: math.exp(min(value, 700.0)) for name, value in nll.items()},
            "base_kl": float(whole.base_kl),
            "retention": float(whole.retention),
            "retention_ci95": list(two_sided(resampled.retention)),
            "hidden_error": _ratio(self.hidden_lost, self.hidden_effect),
        }


def diverge(
    base: BaseModel,
    reference: Known,
    bare: Known,
    compact: Attached,
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Divergence:
    """Runs base, reference and compact over the examples; see `diverge_all`."""
    return diverge_all(base, reference, bare, {"compact": compact}, examples, batch_size, progress)["compact"]


def diverge_all(
    base: BaseModel,
    reference: Known,
    bare: Known,
    compacts: Mapping[str, Attached],
    examples: Sequence[Example],
    batch_size: int,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Divergence]:
    """Runs base, reference and several compact adapters over the examples, a batch at a time; no logits outlive their batch.

    reference, bare: the original on the base, and the base alone. compacts: by name. progress: called with the number of
    examples done.
    """
    found = {name: Divergence() for name in compacts}
    prefix = shared_prefix(examples)

    def begun(compact: Attached) -> Any:
        with compact:
            return base.read_prefix(prefix)

    caches = {name: begun(compact) for name, compact in compacts.items()}
    done = 0
    for batch in batches(examples, batch_size, base.pad):
        hidden, logits = {}, {}
        for name, known in (("reference", reference), ("base", bare)):
            hidden[name], logits[name] = known.predictions(batch, prefix)
        for name, compact in compacts.items():
            with compact:
                own_hidden, own = base.predictions(batch, caches[name])
            found[name].add(batch, {**hidden, "compact": own_hidden}, {**logits, "compact": own})
        done += len(batch.examples)
        progress(done)
    return found


def kl_sums(
    base: BaseModel, reference: Known, compact: Attached, examples: Sequence[Example], size: int
) -> tuple[float, int]:
    """(Sum of KL(reference ‖ compact) over the measured tokens of some examples, their number)."""
    if not examples:
        return 0.0, 0
    prefix = shared_prefix(examples)
    with compact:
        cache = base.read_prefix(prefix)
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for batch in batches(examples, size, base.pad):
            _, logits = reference.predictions(batch, prefix)
            with compact:
                _, other = base.predictions(batch, cache)
            total += float(kl_rows(logits, other).double().sum())
            tokens += len(batch.targets)
    return total, tokens


def kl_rows(logits: Tensor, other: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of each row at a temperature, in float32: (n, v), (n, v) -> (n,)."""
    rows = []
    for p, q in zip(logits.split(TOKENS_AT_ONCE), other.split(TOKENS_AT_ONCE), strict=True):
        log_p = (p.float() / temperature).log_softmax(-1)
        log_q = (q.float() / temperature).log_softmax(-1)
        rows.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(rows)


def _energy(difference: Tensor) -> float:
    return float(difference.double().square().sum())


def _ratio(lost: float, effect: float) -> float:
    return math.sqrt(lost / effect) if effect > 0 else float(lost > 0)
