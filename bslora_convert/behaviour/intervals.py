"""95 % intervals of what was measured on items that were drawn from many more.

Tokens of one row depend on each other, so rows are what is drawn anew: a measure of n rows is a function of sums over rows (Σ KL,
Σ tokens), and a resample is n of them with replacement.
"""

import numpy as np

RESAMPLES = 10_000
ROW_RESAMPLES = 2_000
AT_ONCE = 1 << 22  # numbers that are gathered together, so that memory does not grow with the rows
LEVEL = 0.95
LEAST_ITEMS = 20  # under so many the bootstrap's intervals are too short to be trusted
RULE_OF_THREE = 3.0  # what was seen of none of n items happens to at most 3 / n of all, with 95 % certainty


def resampled_sums(rows: np.ndarray, seed: int = 0, resamples: int = ROW_RESAMPLES) -> np.ndarray:
    """Sums over resamples of rows: (n, k) -> (resamples, k). The same rows and seed give the same sums."""
    values = np.asarray(rows, dtype=np.float64)
    generator = np.random.default_rng(seed)
    size = max(1, AT_ONCE // max(values.size, 1))
    counts = [min(size, resamples - start) for start in range(0, resamples, size)]
    return np.concatenate([values[generator.integers(len(values), size=(n, len(values)))].sum(1) for n in counts])


def two_sided(samples: np.ndarray, level: float = LEVEL) -> tuple[float, float]:
    """The interval that holds the middle `level` of a measure's resamples."""
    low, high = np.quantile(samples, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def at_least(samples: np.ndarray, level: float = LEVEL) -> float:
    """The one-sided bound from below: `level` of the resamples are no less."""
    return float(np.quantile(samples, 1 - level))


def at_most(samples: np.ndarray, level: float = LEVEL) -> float:
    """The one-sided bound from above: `level` of the resamples are no more."""
    return float(np.quantile(samples, level))


def paired_interval(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Bootstrap interval of the mean of first − second, items resampled together.

    Where all items differ by the same (by nothing, as a rule) there is nothing to resample: then up to 3 / n of all items may
    differ by one more or less.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    if np.ptp(difference) == 0:
        unseen = min(1.0, RULE_OF_THREE / len(difference))
        return float(difference[0] - unseen), float(difference[0] + unseen)
    generator = np.random.default_rng(seed)
    means = [difference[generator.integers(len(difference), size=len(difference))].mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def too_few(items: int) -> bool:
    """Whether an interval over so many items says little."""
    return items < LEAST_ITEMS


def few_words(what: str, items: int, kind: str) -> str:
    """What is said of an interval over too few items; kind: what they are, in the plural."""
    return f"{what}: {items} {kind} are too few for its interval to be trusted; {LEAST_ITEMS} or more are needed"
