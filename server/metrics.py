"""What Prometheus scrapes. Labels are tiers and status codes of this server, never anything a caller sent."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
NO_TIER = "none"


class Metrics:
    """The instruments of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("assay_requests", "Requests answered.", ["tier", "status"], registry=self.registry)
        self.duration = Histogram(
            "assay_request_duration_seconds",
            "From the request's headers to the last byte of its answer.",
            ["tier"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "assay_time_to_first_byte_seconds",
            "From the request's headers to the first byte of a good answer's body: a stream's first token.",
            ["tier"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.running = Gauge(
            "assay_requests_running", "Requests an engine works on now.", ["tier"], registry=self.registry
        )
        self.left = Counter(
            "assay_clients_left", "Clients gone before their answer ended.", ["tier"], registry=self.registry
        )
        self.broken = Counter(
            "assay_streams_broken",
            "Streams that ended with an error event.",
            ["tier"],
            registry=self.registry,
        )
        self.connections_refused = Counter(
            "assay_connections_refused",
            "Connections ended with an error before there was a request.",
            ["code"],
            registry=self.registry,
        )
        self.restarts = Counter(
            "assay_engine_restarts", "Times an engine was started again.", ["tier"], registry=self.registry
        )
        self.verified = Gauge(
            "assay_tier_verified",
            "1 if the running engine was seen to compute what its checkpoint declares.",
            ["tier"],
            registry=self.registry,
        )
        self.asleep = Gauge(
            "assay_tier_asleep",
            "1 while the engine has given its GPU memory back.",
            ["tier"],
            registry=self.registry,
        )
        self.waking = Histogram(
            "assay_wake_seconds",
            "How long an engine took to wake for a request.",
            ["tier"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.ready = Gauge("assay_tier_ready", "1 while the tier can answer.", ["tier"], registry=self.registry)

    def declare(self, tier: str) -> None:
        """Show a tier's series from the start, so that a rate over its first event is right."""
        for gauge in (self.ready, self.running, self.verified, self.asleep):
            gauge.labels(tier).set(0)
        for counter in (self.left, self.broken, self.restarts):
            counter.labels(tier)

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)
