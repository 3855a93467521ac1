"""What an operator watches, in Prometheus' text format. No label and no value holds anything of a prompt."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from safety_neurons.guard.server.drift import Drift

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SCORES = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.995, 0.999)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)
_PREFIX = "safety_neurons_guard"


class Metrics:
    """Counts and histograms of one server, in a registry of their own.

    Args:
        drifts: Recent values against those of validation, by name.
    """

    def __init__(self, drifts: Mapping[str, Drift] | None = None) -> None:
        self.registry = CollectorRegistry()
        self.drifts = dict(drifts or {})
        self.requests = self._counter("requests", "Requests, by route and status.", "route", "status")
        self.seconds = self._histogram("request_seconds", "From the request's first byte to the answer's last.", SECONDS, "route")
        self.guard_seconds = self._histogram(
            "verdict_seconds", "From a prompt's arrival to its verdict, the wait included.", SECONDS, "route"
        )
        self.scores = self._histogram("score", "Calibrated probability that the answer would be unsafe.", SCORES)
        self.flagged = self._counter("flagged", "Prompts the guard flagged, by route.", "route")
        self.blocked = self._counter("blocked", "Prompts that were held back, by route; none in shadow mode.", "route")
        self.errors = self._counter("errors", "Prompts without a sound verdict, by kind: truncated, error, timeout.", "kind")
        self.rejected = self._counter("rejected", "Requests turned away, by the code of the error.", "code")
        self.upstream = self._counter("upstream_errors", "Requests the upstream failed, by kind.", "kind")
        self.disconnected = self._counter("disconnected", "Requests whose client went away before the answer.")
        self.batches = self._histogram("batch_rows", "Prompts judged together.", ROWS)
        self.batch_seconds = self._histogram("batch_seconds", "Seconds of the model for a batch.", SECONDS)
        self.waiting = Gauge(f"{_PREFIX}_waiting", "Prompts that wait for the model.", registry=self.registry)
        self.in_flight = Gauge(f"{_PREFIX}_in_flight", "Requests accepted and not yet answered.", registry=self.registry)
        psi = Gauge(f"{_PREFIX}_drift_psi", "Population stability index against validation; NaN below 100.", ["of"], registry=self.registry)
        for name, drift in self.drifts.items():
            psi.labels(name).set_function(lambda drift=drift: drift.index)  # type: ignore[misc]

    def seen(self, score: float | None, distance: float | None) -> None:
        """Takes a verdict's numbers in."""
        if score is not None:
            self.scores.observe(score)
        for name, drift in self.drifts.items():
            value = distance if name == "distance" else score
            if value is not None:
                drift.add(value)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", text, labels, buckets=buckets, registry=self.registry)

    def text(self) -> bytes:
        """The page that is scraped."""
        return generate_latest(self.registry)
