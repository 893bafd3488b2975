"""What Prometheus scrapes: the instruments of one gateway. `server.series` says what each of them is."""

import importlib.metadata
import math
from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Protocol

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from server import series
from server.errors import EngineFailed, FirstTokenLate, NextTokenLate, RequestTooLong, TierUnavailable
from server.meter import Meter
from server.record import CLIENT_CLOSED_REQUEST, CLIENT_LEFT
from tiers.conformance.scores import PHASES, Phase

_FAILURES = (EngineFailed, FirstTokenLate, NextTokenLate, RequestTooLong)
EXPECTED = (
    ("200", ""),
    *(("200", kind.code) for kind in _FAILURES),
    *((str(kind.status), kind.code) for kind in (*_FAILURES, TierUnavailable)),
    (str(CLIENT_CLOSED_REQUEST), CLIENT_LEFT),
)
"""How requests end that the objectives in deploy/prometheus count: shown from the start, at 0."""


class TierStatus(Protocol):
    """What is true of a tier now, as its pool of replicas knows it."""

    @property
    def expected(self) -> int:
        """How many replicas would serve it if all were well; those that leave by themselves would not."""

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
    def requests_at_once(self) -> int:
        """As many as they work on together."""

    @property
    def is_asleep(self) -> bool:
        """Whether one would have to wake first."""

    @property
    def is_verified(self) -> bool:
        """Whether they compute what is declared."""

    @property
    def engine_version(self) -> str | None:
        """What they say they are."""


class QueueStatus(Protocol):
    """How full a tier's queue is."""

    @property
    def waiting(self) -> int:
        """Requests without a place."""

    @property
    def longest(self) -> int:
        """As many may wait."""

    @property
    def taken(self) -> int:
        """Places that are held."""


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
        self.registry = registry = CollectorRegistry()
        self._meters: dict[str, Meter] = {}
        self._tiers: dict[str, TierStatus] = {}
        self.requests = series.REQUESTS.make(registry)
        self.duration = series.DURATION.make(registry)
        self.first_token = series.FIRST_TOKEN.make(registry)
        self.per_token = series.PER_TOKEN.make(registry)
        self.tokens = series.TOKENS.make(registry)
        self.cached = series.CACHED.make(registry)
        self.waiting = series.WAITING.make(registry)
        self.waiting_limit = series.WAITING_LIMIT.make(registry)
        self.slots = series.SLOTS.make(registry)
        self.slots_taken = series.SLOTS_TAKEN.make(registry)
        self.running = series.RUNNING.make(registry)
        self.left = series.LEFT.make(registry)
        self.broken = series.BROKEN.make(registry)
        self.retries = series.RETRIES.make(registry)
        self.connections_refused = series.CONNECTIONS_REFUSED.make(registry)
        self.ready = series.READY.make(registry)
        self.replicas = series.REPLICAS.make(registry)
        self.replicas_ready = series.REPLICAS_READY.make(registry)
        self.replicas_drained = series.REPLICAS_DRAINED.make(registry)
        self.restarts = series.RESTARTS.make(registry)
        self.planned_restarts = series.PLANNED_RESTARTS.make(registry)
        self.ejections = series.EJECTIONS.make(registry)
        self.asleep = series.ASLEEP.make(registry)
        self.waking = series.WAKING.make(registry)
        self.verified = series.VERIFIED.make(registry)
        self.certified = series.CERTIFIED.make(registry)
        self.certificate_age = series.CERTIFICATE_AGE.make(registry)
        self.kl = series.KL.make(registry)
        registry.register(_Build(self._tiers))

    def declare(self, tier: str, status: TierStatus) -> None:
        """Show a tier's series from the start, so that a rate over its first event is right.

        What is true now is asked at each scrape: a tier's replicas so cannot overwrite one another's gauges.
        """
        self._tiers[tier] = status
        for counter in (
            *(self.left, self.broken, self.restarts, self.planned_restarts, self.ejections),
            *(self.retries, self.cached),
        ):
            counter.labels(tier)
        for status_code, code in EXPECTED:
            self.requests.labels(tier, status_code, code)
        self.running.labels(tier).set_function(lambda: status.running)
        self.slots.labels(tier).set_function(lambda: status.requests_at_once)
        self.ready.labels(tier).set_function(lambda: status.ready > 0)
        self.replicas.labels(tier).set_function(lambda: status.expected)
        self.replicas_ready.labels(tier).set_function(lambda: status.ready)
        self.replicas_drained.labels(tier).set_function(lambda: status.drained)
        self.verified.labels(tier).set_function(lambda: status.is_verified)
        self.asleep.labels(tier).set_function(lambda: status.is_asleep)

    def of(self, tier: str) -> Meter:
        """The instruments of one tier, or of `NO_TIER`."""
        meter = self._meters.get(tier)
        if meter is None:
            meter = self._meters[tier] = Meter(self, tier)
        return meter

    def watch_gate(self, tier: str, answers: Callable[[], bool]) -> None:
        """Ask whether the tier answers whenever it is scraped; with engines alone it need not."""
        self.ready.labels(tier).set_function(answers)

    def watch_queue(self, tier: str, queue: QueueStatus) -> None:
        """Ask how full it is whenever it is scraped."""
        self.waiting.labels(tier).set_function(lambda: queue.waiting)
        self.waiting_limit.labels(tier).set_function(lambda: queue.longest)
        self.slots_taken.labels(tier).set_function(lambda: queue.taken)

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


class _Build(Collector):
    """Which versions run: the engines say theirs when they have started, and a gateway may have no vLLM itself."""

    def __init__(self, tiers: dict[str, TierStatus]) -> None:
        self._tiers = tiers
        self._version = importlib.metadata.version("assay")

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """One for each version of an engine; mostly it is one."""
        build = GaugeMetricFamily(series.BUILD.name, series.BUILD.says, labels=series.BUILD.labels)
        for vllm in sorted({status.engine_version or "" for status in self._tiers.values()}):
            build.add_metric((self._version, vllm), 1)
        yield build
