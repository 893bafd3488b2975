"""What Prometheus scrapes. Labels are tiers and status codes of this server, never anything a caller sent."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import methodcaller
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.answer import Usage
from tiers.conformance.scores import PHASES, Phase

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
NO_TIER = "none"
TOKEN_KINDS = ("prompt", "answer", "cached")


class Meter:
    """The instruments of one tier, found once and not at every request."""

    def __init__(self, metrics: "Metrics", tier: str) -> None:
        self._metrics = metrics
        self._tier = tier
        self._requests: dict[str, Counter] = {}
        self._refused: dict[str, Counter] = {}

    @cached_property
    def first_byte(self) -> Histogram:
        """Seconds until a good answer began."""
        return self._metrics.first_byte.labels(self._tier)

    @cached_property
    def _duration(self) -> Histogram:
        return self._metrics.duration.labels(self._tier)

    @cached_property
    def _tokens(self) -> tuple[Counter, Counter, Counter]:
        prompt, answer, cached = (self._metrics.tokens.labels(self._tier, kind) for kind in TOKEN_KINDS)
        return prompt, answer, cached

    def answered(self, status: str, seconds: float) -> None:
        """A request has ended so, after so long."""
        counter = self._requests.get(status)
        if counter is None:
            counter = self._requests[status] = self._metrics.requests.labels(self._tier, status)
        counter.inc()
        self._duration.observe(seconds)

    def refused(self, code: str | None) -> None:
        """A request has ended with this error."""
        code = code or "none"
        counter = self._refused.get(code)
        if counter is None:
            counter = self._refused[code] = self._metrics.refused.labels(self._tier, code)
        counter.inc()

    def used(self, usage: Usage) -> None:
        """An engine has counted so many tokens."""
        prompt, answer, cached = self._tokens
        prompt.inc(usage.prompt)
        answer.inc(usage.answer)
        cached.inc(usage.cached)


class TierStatus(Protocol):
    """What is true of a tier now, as its pool of replicas knows it."""

    @property
    def replicas(self) -> Sequence[object]:
        """All of them, whatever their state."""

    @property
    def ready(self) -> int:
        """How many can answer."""

    @property
    def drained(self) -> int:
        """How many an operator has taken out of service, or is about to start again."""

    @property
    def running(self) -> int:
        """Requests that they work on."""

    @property
    def is_asleep(self) -> bool:
        """Whether one would have to wake first."""

    @property
    def is_verified(self) -> bool:
        """Whether they compute what is declared."""


class CertificateStatus(Protocol):
    """How a tier stands towards its certificate; None where there is none to say it."""

    @property
    def has_passed(self) -> bool:
        """Whether it is within its budget, as it runs now."""

    @property
    def age_s(self) -> float | None:
        """Seconds since the certificate was issued."""

    def kl(self, phase: Phase) -> float | None:
        """Its mean KL divergence."""


class Metrics:
    """The instruments of one gateway, in a registry of their own.

    `multiprocess_mode` says of each gauge what several processes on one port make of it: the sum of what each has
    to itself; of what is true of a tier, that which is worth an alarm if only one of them sees it.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._meters: dict[str, Meter] = {}
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
            "assay_requests_running",
            "Requests an engine works on now, or is woken for.",
            ["tier"],
            multiprocess_mode="sum",
            registry=self.registry,
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
        self.retries = Counter(
            "assay_retries",
            "Requests sent to another replica of their tier, since the first broke before it had said anything.",
            ["tier"],
            registry=self.registry,
        )
        self.tokens = Counter(
            "assay_tokens",
            "Tokens that engines have counted; cached ones of a prompt are also among those of the prompt.",
            ["tier", "kind"],
            registry=self.registry,
        )
        self.waiting = Gauge(
            "assay_requests_waiting",
            "Requests in the tier's queue.",
            ["tier"],
            multiprocess_mode="sum",
            registry=self.registry,
        )
        self.refused = Counter(
            "assay_requests_refused",
            "Requests that ended with an error, by its code.",
            ["tier", "code"],
            registry=self.registry,
        )
        self.connections_refused = Counter(
            "assay_connections_refused",
            "Connections ended with an error before there was a request.",
            ["code"],
            registry=self.registry,
        )
        self.restarts = Counter(
            "assay_engine_restarts",
            "Times an engine that had failed was started again.",
            ["tier"],
            registry=self.registry,
        )
        self.planned_restarts = Counter(
            "assay_engine_planned_restarts",
            "Times an engine was ended and started again because an operator asked for it (`assay drain`).",
            ["tier"],
            registry=self.registry,
        )
        self.ejections = Counter(
            "assay_engine_ejections",
            "Times an engine was taken out of service for a while because it erred at every request.",
            ["tier"],
            registry=self.registry,
        )
        self.verified = Gauge(
            "assay_tier_verified",
            "1 if the running engines were seen to compute what their checkpoint declares.",
            ["tier"],
            multiprocess_mode="min",
            registry=self.registry,
        )
        self.certified = Gauge(
            "assay_tier_certified",
            "1 if a certificate says that the tier, as it runs now, is within its budget.",
            ["tier"],
            multiprocess_mode="min",
            registry=self.registry,
        )
        self.kl = Gauge(
            "assay_tier_kl",
            "Mean KL divergence from the reference in the tier's certificate, nats per token; NaN without one.",
            ["tier", "phase"],
            multiprocess_mode="max",
            registry=self.registry,
        )
        self.certificate_age = Gauge(
            "assay_certificate_age_seconds",
            "Since the tier's certificate was issued, whether it still holds or not; NaN without one.",
            ["tier"],
            multiprocess_mode="max",
            registry=self.registry,
        )
        self.asleep = Gauge(
            "assay_tier_asleep",
            "1 while the tier's engines have given their GPU memory back.",
            ["tier"],
            multiprocess_mode="max",
            registry=self.registry,
        )
        self.waking = Histogram(
            "assay_wake_seconds",
            "How long an engine took to wake for a request.",
            ["tier"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.ready = Gauge(
            "assay_tier_ready",
            "1 while the tier can answer.",
            ["tier"],
            multiprocess_mode="min",
            registry=self.registry,
        )
        self.replicas = Gauge(
            "assay_replicas",
            "Engines that serve the tier when all is well.",
            ["tier"],
            multiprocess_mode="max",
            registry=self.registry,
        )
        self.replicas_ready = Gauge(
            "assay_replicas_ready",
            "Engines of the tier that can answer now.",
            ["tier"],
            multiprocess_mode="min",
            registry=self.registry,
        )
        self.replicas_drained = Gauge(
            "assay_replicas_drained",
            "Engines of the tier that an operator has out of service (`assay drain`): no cause for an alarm.",
            ["tier"],
            multiprocess_mode="max",
            registry=self.registry,
        )

    def declare(self, tier: str, status: TierStatus) -> None:
        """Show a tier's series from the start, so that a rate over its first event is right.

        What is true now is asked at each scrape: a tier's replicas so cannot overwrite one another's gauges.
        """
        for counter in (
            self.left,
            self.broken,
            self.restarts,
            self.planned_restarts,
            self.ejections,
            self.retries,
        ):
            counter.labels(tier)
        self.running.labels(tier).set_function(lambda: status.running)
        self.ready.labels(tier).set_function(lambda: status.ready > 0)
        self.replicas.labels(tier).set_function(lambda: len(status.replicas))
        self.replicas_ready.labels(tier).set_function(lambda: status.ready)
        self.replicas_drained.labels(tier).set_function(lambda: status.drained)
        self.verified.labels(tier).set_function(lambda: status.is_verified)
        self.asleep.labels(tier).set_function(lambda: status.is_asleep)
        for kind in TOKEN_KINDS:
            self.tokens.labels(tier, kind)

    def of(self, tier: str) -> Meter:
        """The instruments of one tier, or of `NO_TIER`."""
        meter = self._meters.get(tier)
        if meter is None:
            meter = self._meters[tier] = Meter(self, tier)
        return meter

    def watch_queue(self, tier: str, waiting: Callable[[], int]) -> None:
        """Ask how many requests wait whenever it is scraped."""
        self.waiting.labels(tier).set_function(waiting)

    def watch_certificate(self, tier: str, standing: Callable[[], CertificateStatus]) -> None:
        """Ask how the tier stands whenever it is scraped."""

        def figure(asked: Callable[[CertificateStatus], float | None]) -> Callable[[], float]:
            # Of a tier without a certificate 0 would say too much, and a series that is missing raises no alarm.
            return lambda: math.nan if (value := asked(standing())) is None else value

        self.certified.labels(tier).set_function(figure(lambda now: now.has_passed))
        self.certificate_age.labels(tier).set_function(figure(lambda now: now.age_s))
        for phase in PHASES:
            self.kl.labels(tier, phase).set_function(figure(methodcaller("kl", phase)))

    def exposition(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)

    async def scrape(self) -> bytes:
        """The same, for a gateway that is one process."""
        return self.exposition()
