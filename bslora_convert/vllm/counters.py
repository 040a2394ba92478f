"""What became of requests for tenants, in vLLM's own `/metrics` where its client library is installed."""

from collections import Counter
from typing import Any

METRIC = "bslora_convert_tenants"
HIT, LOADED, REFUSED, UNKNOWN = OUTCOMES = ("hit", "loaded", "refused", "unknown")


class Outcomes:
    """Counts by outcome: found as it had been written before, decoded and written, refused, no such name."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self._metric = _metric()

    def add(self, outcome: str) -> None:
        """Counts one."""
        self.counts[outcome] += 1
        if self._metric is not None:
            self._metric.labels(outcome=outcome).inc()

    def words(self) -> str:
        """All counts, for a line of log."""
        return ", ".join(f"{outcome} {self.counts[outcome]}" for outcome in OUTCOMES)


def _metric() -> Any:
    try:
        from prometheus_client import Counter as Metric
    except ImportError:
        return None
    try:
        return Metric(METRIC, "Requests for tenants of a compact library", ["outcome"])
    except ValueError:  # registered already in this process
        return None
