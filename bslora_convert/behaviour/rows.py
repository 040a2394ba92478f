"""What was measured on each row, and what rows say together: token-weighted means, and intervals over rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bslora_convert.behaviour.intervals import resampled_sums
from bslora_convert.behaviour.prompts import Example

MEASURED = ("kl", "base_kl", "retention", "agreement")


@dataclass(frozen=True, slots=True)
class RowSums:
    """Sums over one row's measured tokens. kl, base_kl: nats; agreed: tokens with the same first choice."""

    example: Example
    tokens: int
    kl: float
    base_kl: float
    agreed: int

    @property
    def mean_kl(self) -> float:
        """KL a token."""
        return self.kl / self.tokens


@dataclass(frozen=True, slots=True)
class Means:
    """Measures of rows together, (…) each; of one sample a number, of resamples one each."""

    kl: np.ndarray
    base_kl: np.ndarray
    agreement: np.ndarray

    @classmethod
    def of(cls, sums: np.ndarray) -> "Means":
        """From sums over rows as `table` has its columns: (…, 4)."""
        tokens, kl, base_kl, agreed = np.moveaxis(sums, -1, 0)
        return cls(np.maximum(kl / tokens, 0.0), base_kl / tokens, agreed / tokens)  # rounding takes a KL of 0 below it

    @property
    def retention(self) -> np.ndarray:
        """1 − kl / base_kl; where the original changes nothing, 1 for an adapter that does nothing either, else 0."""
        effect = np.where(self.base_kl > 0, self.base_kl, 1.0)
        return np.where(self.base_kl > 0, 1 - self.kl / effect, self.kl == 0)


def table(rows: Sequence[RowSums]) -> np.ndarray:
    """(n, 4): tokens, KL, KL of the base, agreed tokens of each row, in the order of the file's lines.

    The order of batches does not move what is drawn from it.
    """
    ordered = sorted(rows, key=lambda row: row.example.row.line)
    return np.array([(row.tokens, row.kl, row.base_kl, row.agreed) for row in ordered], dtype=np.float64)


def means(rows: Sequence[RowSums]) -> Means:
    """What the rows say together."""
    return Means.of(table(rows).sum(0))


def resampled_means(rows: Sequence[RowSums], seed: int = 0) -> Means:
    """What resamples of the rows say, (resamples,) each: for `two_sided`, `at_least` and `at_most`."""
    return Means.of(resampled_sums(table(rows), seed))


def measures(found: Means) -> dict[str, float]:
    """The measures by name, of one sample."""
    return {name: float(getattr(found, name)) for name in MEASURED}
