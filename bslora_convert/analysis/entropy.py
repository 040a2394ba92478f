"""The paper's entropy similarity, Relative Mutual Information, of two updates (BSLoRA, appendix A.2, equations 7 to 10).

Numbers of an update are taken as draws from a normal distribution:

    H(X) = ½ ln(2πe σ²_X)                     entropy from the variance of all numbers of X
    H(X, Y)                                   the same of the numbers of X and Y together
    I(X; Y) = H(X) + H(Y) − H(X, Y)           RMI = I(X; Y) / max(|H(X)|, |H(Y)|), signed as I and H agree or not

Mean and variance of ΔW = B A come from its factors: Σ ΔW = (1ᵀB)(A 1), Σ ΔW² = ⟨BᵀB, A Aᵀ⟩. Nothing is sampled.

The appendix leaves the joint density open. The reading here pools the numbers of both, which is the one that is defined for two
updates of different shapes. It sees variances only: two updates of like variance have an RMI of 1 whatever else they are, so it
says nothing about what can be shared. It is reported because the paper argues with it, beside measures that can be wrong.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bslora_convert.modules.lowrank import Delta, Grams


@dataclass(frozen=True, slots=True)
class Pool:
    """Numbers of one update or of several together: how many, their sum, the sum of their squares."""

    count: int
    total: float
    squares: float

    def __add__(self, other: "Pool") -> "Pool":
        return Pool(self.count + other.count, self.total + other.total, self.squares + other.squares)

    @property
    def variance(self) -> float:
        """Mean square minus squared mean; 0 of nothing."""
        if not self.count:
            return 0.0
        return max(self.squares / self.count - (self.total / self.count) ** 2, 0.0)

    @property
    def entropy(self) -> float:
        """H in nats; −inf for numbers that are all the same."""
        return 0.5 * math.log(2 * math.pi * math.e * self.variance) if self.variance > 0 else -math.inf


NOTHING = Pool(0, 0.0, 0.0)


def pool(delta: Delta, grams: Grams) -> Pool:
    """All numbers of ΔW (out, in), from its factors."""
    stored = delta.stored
    columns, rows = stored.b.double().sum(0), stored.a.double().sum(1)
    out, width = delta.shape
    return Pool(out * width, delta.scaling * float(columns @ rows), grams.energy)


def relative_mutual_information(first: Pool, second: Pool) -> float:
    """RMI of two pools; 0 where one of them is constant."""
    one, two, joint = first.entropy, second.entropy, (first + second).entropy
    largest = max(abs(one), abs(two))
    if not math.isfinite(one) or not math.isfinite(two) or largest == 0:
        return 0.0
    return math.copysign(1.0, joint) * (one + two - joint) / largest


def rmi_matrix(pools: Sequence[Pool]) -> list[list[float]]:
    """RMI of every pair."""
    return [[relative_mutual_information(first, second) for second in pools] for first in pools]


def merged(pools: Mapping[str, Pool], members: Sequence[str]) -> Pool:
    """Several updates as one pool."""
    return sum((pools[name] for name in members), NOTHING)
