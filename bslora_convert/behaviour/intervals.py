"""95 % intervals of what was measured on items that were drawn from many more."""

import numpy as np

RESAMPLES = 10_000
LEAST_ITEMS = 20  # under so many the bootstrap's intervals are too short to be trusted
RULE_OF_THREE = 3.0  # what was seen of none of n items happens to at most 3 / n of all, with 95 % certainty


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
