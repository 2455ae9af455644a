"""What Prometheus is told of the server."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        """Register them."""
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.seconds = Histogram(
            "ringformer_request_seconds", "From a request to its answer.", ["status"],
            registry=self.registry,
        )  # fmt: skip
        self.characters = Counter(
            "ringformer_characters", "Translated, of sources.", ["source", "target"],
            registry=self.registry,
        )  # fmt: skip
        self.batch_lines = Histogram(
            "ringformer_batch_lines", "Translated together.", ["source", "target"],
            buckets=[2**power for power in range(10)], registry=self.registry,
        )  # fmt: skip
        self.waiting = Gauge(
            "ringformer_waiting_requests", "Not yet in a batch.", ["source", "target"],
            registry=self.registry,
        )  # fmt: skip
