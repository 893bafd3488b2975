"""Every series that Prometheus scrapes, a definition each: what it is called, says, and is labelled with.

What OpenTelemetry's conventions for generative AI name has that name here, spelled as its exporter to Prometheus
spells it (dots are underscores, seconds are said, `{token}` is not), with the conventions' labels and boundaries,
and some more where answers take longer. All else is `assay_*`. Labels are configured tiers and words of this
server, never anything a caller sent.
"""

from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

OPERATION, PROVIDER_NAME, MODEL, TOKEN_TYPE, ERROR = (
    *("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model", "gen_ai_token_type", "error_type"),
)
"""The conventions' labels. The model is the tier, whichever of its names a caller used; no error is an empty one,
which to Prometheus is none."""
_CALL = (OPERATION, PROVIDER_NAME, MODEL)

_DURATIONS = (
    *(0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92),
    *(163.84, 327.68, 655.36),
)
_FIRST_TOKENS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0),
)
_PER_TOKEN = (0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)
_WAKING = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


@dataclass(frozen=True)
class Count:
    """What only grows; Prometheus appends `_total` to its name."""

    name: str
    says: str
    labels: tuple[str, ...] = ("tier",)

    def make(self, registry: CollectorRegistry) -> Counter:
        """The instrument."""
        return Counter(self.name, self.says, self.labels, registry=registry)


@dataclass(frozen=True)
class Level:
    """What is so at the moment."""

    name: str
    says: str
    together: Literal["sum", "min", "max"]
    """Of several processes of one gateway: what each counts is added; of what all see, the worse is told."""
    labels: tuple[str, ...] = ("tier",)

    def make(self, registry: CollectorRegistry) -> Gauge:
        """The instrument."""
        return Gauge(self.name, self.says, self.labels, registry=registry, multiprocess_mode=self.together)


@dataclass(frozen=True)
class Spread:
    """How often something was how much: `_bucket`, `_sum` and `_count`."""

    name: str
    says: str
    bounds: tuple[float, ...]
    labels: tuple[str, ...] = ("tier",)

    def make(self, registry: CollectorRegistry) -> Histogram:
        """The instrument."""
        return Histogram(self.name, self.says, self.labels, registry=registry, buckets=self.bounds)


REQUESTS = Count(
    "assay_requests",
    "Requests to the API by HTTP status and, of those that ended with an error, its code. One that came after its "
    'stream had begun leaves the status at 200. The tier is "none" where a request came to none.',
    ("tier", "status", "code"),
)
DURATION = Spread(
    "gen_ai_server_request_duration_seconds",
    "Of requests for text: from the head to the last byte of the answer, or of the error, by its code.",
    _DURATIONS,
    (*_CALL, ERROR),
)
FIRST_TOKEN = Spread(
    "gen_ai_server_time_to_first_token_seconds",
    "Of streams: from the request's head to the first token, the time in the queue included.",
    _FIRST_TOKENS,
    _CALL,
)
PER_TOKEN = Spread(
    "gen_ai_server_time_per_output_token_seconds",
    "Of streams that ended well: what passed after the first token, divided by the tokens after it; one value a "
    "request, in which a caller who reads slowly shows too.",
    _PER_TOKEN,
    _CALL,
)
TOKENS = Spread(
    "gen_ai_client_token_usage",
    "Tokens of a request (input) and of its answer (output), as the engine counted them.",
    _TOKENS,
    (*_CALL, TOKEN_TYPE),
)
CACHED = Count(
    "assay_cached_tokens", "Tokens of prompts that were in an engine's prefix cache; among the input's."
)
WAITING = Level("assay_requests_waiting", "Requests in the tier's queue.", "sum")
WAITING_LIMIT = Level("assay_requests_waiting_limit", "As many may be in it (`max_waiting`).", "sum")
SLOTS = Level("assay_slots", "Answers that the tier's engines work on together.", "max")
SLOTS_TAKEN = Level("assay_slots_taken", "Those that are under way, or wait inside an engine.", "sum")
RUNNING = Level("assay_requests_running", "Requests an engine works on now, or is woken for.", "sum")
LEFT = Count("assay_clients_left", "Clients gone before their answer ended.")
BROKEN = Count("assay_streams_broken", "Streams that an engine broke off, so that they ended with an error event.")
RETRIES = Count(
    "assay_retries",
    "Requests sent to another replica of their tier, since the first broke before it had said anything.",
)
CONNECTIONS_REFUSED = Count(
    "assay_connections_refused", "Connections ended with an error before there was a request.", ("code",)
)
READY = Level("assay_tier_ready", "1 while the tier answers: an engine can, and its gate lets it.", "min")
REPLICAS = Level("assay_replicas", "Engines that serve the tier when all is well; not those that leave.", "max")
REPLICAS_READY = Level("assay_replicas_ready", "Engines of the tier that can answer now.", "min")
REPLICAS_DRAINED = Level(
    "assay_replicas_drained",
    "Engines of the tier that an operator has out of service (`assay drain`): no cause for an alarm.",
    "max",
)
RESTARTS = Count("assay_engine_restarts", "Times an engine that had failed was started again.")
PLANNED_RESTARTS = Count(
    "assay_engine_planned_restarts",
    "Times an engine was ended and started again because an operator asked for it (`assay drain`).",
)
EJECTIONS = Count(
    "assay_engine_ejections",
    "Times an engine was taken out of service for a while because it erred at every request.",
)
ASLEEP = Level("assay_tier_asleep", "1 while the tier's engines have given their GPU memory back.", "max")
WAKING = Spread("assay_wake_seconds", "How long an engine took to wake for a request.", _WAKING)
VERIFIED = Level(
    "assay_tier_verified", "1 if the running engines were seen to compute what their checkpoint declares.", "min"
)
CERTIFIED = Level(
    "assay_tier_certified", "1 if a certificate says that the tier, as it runs now, is within its budget.", "min"
)
CERTIFICATE_AGE = Level(
    "assay_certificate_age_seconds",
    "Since the tier's certificate was issued, whether it still holds or not; NaN without one.",
    "max",
)
KL = Level(
    "assay_tier_kl",
    "Mean KL divergence from the reference in the tier's certificate, nats per token; NaN without one.",
    "max",
    ("tier", "phase"),
)
BUILD = Level(
    "assay_build_info", "1; the labels say which version of Assay runs, and of vLLM.", "max", ("version", "vllm")
)
SERIES = (
    *(REQUESTS, DURATION, FIRST_TOKEN, PER_TOKEN, TOKENS, CACHED),
    *(WAITING, WAITING_LIMIT, SLOTS, SLOTS_TAKEN, RUNNING),
    *(LEFT, BROKEN, RETRIES, CONNECTIONS_REFUSED),
    *(READY, REPLICAS, REPLICAS_READY, REPLICAS_DRAINED, RESTARTS, PLANNED_RESTARTS, EJECTIONS, ASLEEP, WAKING),
    *(VERIFIED, CERTIFIED, CERTIFICATE_AGE, KL, BUILD),
)
"""All of them, in the order of `deploy/README.md`."""
